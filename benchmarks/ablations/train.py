"""What do the parts of denoiser training give? One small backbone, one denoiser per variant.

Every variant reads the same rows for as many steps with the same seed, and is judged on the same
held-out prompts by its own block size; the limit is the backbone's own accuracy, token by token
("ar"). What is done already is not done again. The last line is one JSON object.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.ablations.scoring import (
    RESULTS,
    Record,
    answer_bounds,
    judge,
    merge,
    to_record,
    write,
)
from benchmarks.ablations.variants import (
    ALIGN,
    CATEGORIES,
    TABLES,
    VARIANTS,
    backbone_options,
    denoiser_options,
    shard_options,
)
from rich.console import Console
from rich.progress import Progress

import twotower
from twotower.checkpoint import load_checkpoint
from twotower.cli.machine import recorded
from twotower.cli.prepare import BUILT_IN
from twotower.cli.scripts import script_parser
from twotower.cli.train import TrainProgress
from twotower.engine import GenerateOptions
from twotower.lab.corpus import Document
from twotower.lab.evaluate.run import Item, draw_groups
from twotower.train.loop import train_steps
from twotower.train.options import TrainOptions
from twotower.train.prepare import prepare
from twotower.train.run_folder import versions

THRESHOLDS = (0.8, 0.95)
BOUND_SAMPLES = 8  # noisings of each answer's blocks
MAX_NEW_TOKENS = 96  # longer than any completion of these categories


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    for options in shard_options(args.out, args.data_tokens, args.denoiser_data_tokens):
        if not options.output.exists():
            print(f"preparing {options.output}", flush=True)
            for _ in prepare(options, BUILT_IN):
                pass
    backbone = backbone_options(args.out, args.steps, args.seed, args.threads, args.compile)
    baseline: list[Item] = []
    run_once(args, "backbone", backbone, baseline)
    for name in chosen_variants(args.table, args.variants):
        options = denoiser_options(name, args.out, args.denoiser_steps, args.seed, args.threads)
        run_once(args, name, options, baseline)
    print(json.dumps({"done": sorted(file.stem for file in args.results.glob("train-*.json"))}))


def parser() -> argparse.ArgumentParser:
    found = script_parser(__doc__, "python -m benchmarks.ablations.train")
    found.add_argument(
        "--table",
        choices=("all", *TABLES),
        default="all",
        help="variants to train: those of one table, or all",
    )
    found.add_argument("--variants", help="instead of a table: " + ", ".join(VARIANTS))
    found.add_argument(
        "--out", type=Path, default=Path("runs/ablations"), help="folder of weights and data"
    )
    found.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    found.add_argument("--steps", type=int, default=2800, help="training steps of the backbone")
    found.add_argument(
        "--denoiser-steps", type=int, default=900, help="training steps of each denoiser"
    )
    found.add_argument(
        "--data-tokens", type=int, default=9_000_000, help="tokens of the backbone's training data"
    )
    found.add_argument(
        "--denoiser-data-tokens",
        type=int,
        default=4_000_000,
        help="tokens of the denoisers' training data",
    )
    found.add_argument("--items", type=int, default=80, help="prompts of each category")
    found.add_argument(
        "--batch-size", type=int, default=40, help="sequences decoded at the same time"
    )
    found.add_argument("--seed", type=int, default=0, help="seed of data, weights and prompts")
    found.add_argument("--threads", type=int, default=1, help="CPU threads")
    found.add_argument(
        "--compile", action="store_true", help="use torch.compile to train the backbone"
    )
    return found


def chosen_variants(table: str, variants: str | None) -> tuple[str, ...]:
    """Names in the order of training; ValueError for one that does not exist."""
    if variants is None:
        return tuple(VARIANTS) if table == "all" else TABLES[table]
    names = tuple(variants.split(","))
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"variants: {name!r} is unknown; use some of {', '.join(VARIANTS)}")
    return names


def run_once(
    args: argparse.Namespace, name: str, options: TrainOptions, baseline: list[Item]
) -> None:
    """Train and judge, unless the record of exactly this exists."""
    file = args.results / f"train-{name}.json"
    kept = ("items", "seed", "data_tokens", "denoiser_data_tokens")
    asked = {key: getattr(args, key) for key in kept}
    wanted = json.loads(json.dumps({**asked, "options": options.to_dict()}))
    wanted["options"] |= {"config": options.config and options.config.name}
    if file.exists() and json.loads(file.read_text())["asked"] == wanted:
        print(f"{name}: done already ({file})", flush=True)
        return
    seconds = train_to_end(name, options)
    begin = time.perf_counter()
    record = score(args, name, options, baseline)
    write(
        {
            "name": name,
            "asked": wanted,
            "recorded": recorded(),
            "versions": versions(),
            **seconds,
            "score_seconds": time.perf_counter() - begin,
            "curve": [json.loads(line) for line in read_lines(options.run_folder)],
            **record,
        },
        file,
    )
    # The exported model is all that is needed.
    shutil.rmtree(options.run_folder / "checkpoints", ignore_errors=True)
    for mode, row in record["modes"].items():
        print(f"{name}: {mode} {100 * row['accuracy']:.1f} %, {row['tokens_per_nfe']} tokens/NFE")


def train_to_end(name: str, options: TrainOptions) -> dict[str, float | None]:
    """Train, or go on from a checkpoint; an interrupted run ends the whole script.

    Seconds by the clock and of the processor, of this call: none if there was nothing left to do.
    """
    if (options.run_folder / "export").exists():
        before = json.loads((options.run_folder / "options.json").read_text())
        if "out" in before:  # as runs of older versions call it
            before["output"] = before.pop("out")
        if TrainOptions(**before) != options:
            raise SystemExit(f"{options.run_folder}: holds another run; remove it or change --out")
        return {"train_seconds": None, "train_cpu_seconds": None}
    clock, processor = time.perf_counter(), time.process_time()
    report = None
    with TrainProgress(name) as progress:
        for report in train_steps(options):
            progress.update(report)
    if report is not None and report.step < options.steps:
        raise SystemExit(f"{name}: stopped at step {report.step}; the same command goes on")
    return {
        "train_seconds": time.perf_counter() - clock,
        "train_cpu_seconds": time.process_time() - processor,
    }


def score(
    args: argparse.Namespace, name: str, options: TrainOptions, baseline: list[Item]
) -> Record:
    """Accuracy and passes: "ar" is the backbone, "own ar" the context head of tied towers.

    `baseline` is filled with the backbone's answers when it is empty.
    """
    tokenizer = twotower.load_tokenizer(args.out / "packed")
    groups = draw_groups(CATEGORIES, args.items, args.seed, args.batch_size)
    if not baseline:
        backbone = load_checkpoint(args.out / "backbone" / "export", towers="context")
        baseline += answer(backbone, tokenizer, {"ar": decoding("ar")}, groups)
    items = baseline
    if name != "backbone":
        model = load_checkpoint(options.run_folder / "export")
        # As many passes as tokens are allowed: a limit would commit unsure tokens of large blocks.
        passes = model.config.block_size
        modes = {
            f"diffusion {x:g}": decoding(
                "diffusion", confidence_threshold=x, steps_per_block=passes
            )
            for x in THRESHOLDS
        }
        if options.is_tied:
            modes["own ar"] = decoding("ar")
        items = merge(baseline, answer(model, tokenizer, modes, groups))
    record = to_record(items, args.seed)
    if name != "backbone":
        documents = [document for group in groups for document in group]
        found = answer_bounds(model, tokenizer, documents, ALIGN, BOUND_SAMPLES, args.seed)
        record["bounds"] = [round(bound, 5) for bound in found]
    return record


def answer(
    model: Any,
    tokenizer: Any,
    modes: dict[str, GenerateOptions],
    groups: Sequence[Sequence[Document]],
) -> list[Item]:
    """`judge` with a progress bar."""
    total = sum(map(len, groups))
    with Progress(console=Console(stderr=True)) as bar:
        found = judge(model, tokenizer, modes, groups)
        return list(bar.track(found, total=total, description=", ".join(modes)))


def decoding(mode: str, **given: float) -> GenerateOptions:
    return GenerateOptions(mode=mode, max_new_tokens=MAX_NEW_TOKENS, **given)


def read_lines(run: Path) -> Iterator[str]:
    with (run / "metrics.jsonl").open(encoding="utf-8") as lines:
        yield from lines


if __name__ == "__main__":
    main()
