"""What each part of a thin denoiser is worth: variants trained alike, each without one part.

All variants see the same answers and blocks in the same order, for the same number of steps, from
the same seed. Tokens a cycle are greedy chains against answers that were not trained on; their
spread is of a bootstrap over those answers, paired with the first variant. The cost of a draft is
measured too: the smallest time of a pass of the int8 denoiser, as an AR step of the backbone has 1.

Physical limit: a draft reads its weights once, so a variant cannot take less of an AR step than its
share of the bytes.

    twotower adapt -m smollm2.gguf --prompts FILES --work WORK --out DIR --stage answers
    python benchmarks/denoiser_parts.py smollm2.gguf WORK --steps 320 --json parts.json
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import twotower
from twotower.adapt.features import Features, Place, attended, find_places
from twotower.adapt.options import StepOptions, ThinOptions, WorkFolder
from twotower.adapt.run import HELD_OUT, draft_vocabulary, reads_of
from twotower.adapt.training import Trainer, measure
from twotower.checkpoint.denoiser import with_new_denoiser
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.model import TwoTower
from twotower.model.thin import thin_config

FULL, STEPS = ThinOptions(layers=3), StepOptions(warmup_steps=40)
VARIANTS: dict[str, tuple[ThinOptions, StepOptions]] = {
    "all parts": (FULL, STEPS),
    "no hidden state": (replace(FULL, reads_hidden=False), STEPS),
    "no bigram term": (replace(FULL, bigram_rank=0), STEPS),
    "draft vocabulary of 4,096": (replace(FULL, draft_vocab=4096), STEPS),
    "draft vocabulary of 16,384": (replace(FULL, draft_vocab=16384), STEPS),
    "two layers": (replace(FULL, layers=2), STEPS),
    "one layer": (replace(FULL, layers=1), STEPS),
    "no distillation": (FULL, replace(STEPS, soft_targets=0.0)),
    "distillation alone": (FULL, replace(STEPS, soft_targets=1.0)),
    "all tokens weigh alike": (FULL, replace(STEPS, loss_decay=1e6)),
    "block of 5": (replace(FULL, block_size=5), STEPS),
    "block of 16": (replace(FULL, block_size=16), STEPS),
}


def made(model: TwoTower, work: WorkFolder, thin: ThinOptions, seed: int) -> TwoTower:
    """A denoiser before its first step, of the last of the layers that FULL reads: those are in the
    features.
    """
    assert thin.layers is not None
    reads = reads_of(model.config, FULL)
    reads = reads[len(reads) - thin.layers * len(reads) // 3 :]
    size, vocab_size = thin.draft_vocab, model.config.vocab_size
    ids = draft_vocabulary(work, size, vocab_size) if 0 < size < vocab_size else None
    config = thin_config(model.config, reads, thin.own_block_size, thin.draft_of(ids))
    return with_new_denoiser(model, config, ids, seed)


def trained(
    start: TwoTower, places: list[Place], features: Features, options: StepOptions, steps: int
) -> tuple[float, float]:
    """Train it; processor seconds, and the mean loss of the last tenth of the steps."""
    trainer, losses, began = Trainer(start, features, options), list[float](), time.process_time()
    for step in range(steps):
        losses.append(trainer.take_step(places, step / steps))
    return time.process_time() - began, float(np.mean(losses[-(steps // 10) :]))


def costs(model: TwoTower, repeats: int = 200) -> tuple[float, float]:
    """Milliseconds of a draft of one row and of an AR step, the smallest of some, at 256 tokens."""
    native = twotower.accelerate(model, "native", "int8")
    cache = native.empty_cache(1)
    tokens = torch.arange(256).unsqueeze(0)
    native.extend(cache, tokens)
    block = torch.full((1, model.config.block_size), model.config.mask_token_id)
    block[0, 0] = 5

    def fastest(run: Iterator[object]) -> float:
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            next(run)
            found.append(time.perf_counter() - began)
        return 1e3 * min(found)

    def drafts() -> Iterator[object]:
        view = cache.view()
        while True:
            yield native.denoise(block, view, None)

    def steps() -> Iterator[object]:
        newest, none = torch.tensor([[5]]), None
        while True:
            yield native.context_head(native.verify(cache, newest, none, False).hidden)

    return fastest(drafts()), fastest(steps())


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("model", help="backbone: checkpoint folder, GGUF file or hub id")
    parser.add_argument(
        "work", type=Path, help="--work folder of a twotower adapt whose answers are written"
    )
    parser.add_argument("--steps", type=int, default=320, help="training steps of each variant")
    parser.add_argument(
        "--held-out", type=int, default=60, help="answers that are not trained on, to measure"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and bootstrap")
    parser.add_argument(
        "--variants",
        nargs="*",
        default=list(VARIANTS),
        choices=list(VARIANTS),
        help="variants to train",
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="file of the record, rewritten after every variant"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, work = twotower.load_model(given.model), WorkFolder(given.work)
    places = [p for p in find_places(work.features) if p.last - p.start >= 2]
    held = places[::HELD_OUT][: given.held_out]
    known = [place for number, place in enumerate(places) if number % HELD_OUT]
    features, found = Features(attended(model.config.context, reads_of(model.config, FULL))), []
    for name in given.variants:
        thin, steps = VARIANTS[name]
        steps = replace(steps, seed=given.seed)
        own = made(model, work, thin, given.seed)
        seconds, loss = trained(own, known, features, steps, given.steps)
        each = [measure(own, features, [place]) for place in held]
        right = np.mean([acceptance.right for acceptance in each], axis=0)
        draft, step = costs(own)
        found.append(
            {
                "variant": name,
                "thin": asdict(thin),
                "blocks": given.steps * steps.blocks,
                "processor_s": round(seconds, 1),
                "loss": round(loss, 4),
                "tokens_per_cycle": [round(a.tokens_per_cycle, 4) for a in each],
                "mean": round(measure(own, features, held).tokens_per_cycle, 4),
                "right": [round(float(share), 4) for share in right],
                "draft_ms": round(draft, 3),
                "ar_step_ms": round(step, 3),
            }
        )
        print(json.dumps({k: v for k, v in found[-1].items() if k != "tokens_per_cycle"}))
        shown = {"steps": given.steps, "held_out": len(held), "answers": len(known)}
        result = {"recorded": recorded(), **shown, "seed": given.seed, "variants": found}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
