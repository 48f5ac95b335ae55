"""How many tokens a second does training take in, for each recipe?

Limit: 6 operations a parameter and token for the trained tower (2 for the frozen one) over the
machine's arithmetic peak. Whole optimiser steps on random tokens, whose cost does not depend on
content; median after warm-up. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import twotower
from twotower.checkpoint import save_backbone
from twotower.cli.prepare import BUILT_IN
from twotower.cli.scripts import script_parser
from twotower.model.initialise import randomise
from twotower.train.loop import train_steps
from twotower.train.options import TrainOptions
from twotower.train.prepare import PrepareOptions, prepare
from twotower.train.presets import preset_config


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--recipe", choices=("backbone", "denoiser"), default="backbone", help="what is trained"
    )
    parser.add_argument("--preset", default="small", help="size of the model: tiny, small or moe")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="precision of activations",
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        speed = measure(Path(folder), args)
    parameters = 2 if args.recipe == "denoiser" else 1
    print(f"{args.recipe}: {speed:.0f} tokens/s on {args.threads} threads")
    print(
        json.dumps(
            {**vars(args), "tokens_per_s": speed, "towers": parameters, "torch": torch.__version__}
        )
    )


def measure(folder: Path, args: argparse.Namespace) -> float:
    """Median tokens/s of `args.steps` steps after three of warm-up."""
    for _ in prepare(
        PrepareOptions(output=folder / "data", tokens=200_000, vocab_size=1024), BUILT_IN
    ):
        pass
    init = None
    if args.recipe == "denoiser":
        init = folder / "backbone"
        vocab_size = twotower.load_tokenizer(folder / "data").vocab_size
        model = twotower.TwoTower(preset_config(args.preset, vocab_size), towers="context")
        randomise(model, seed=0)
        save_backbone(model, init)
    options = TrainOptions(
        recipe=args.recipe,
        data=folder / "data",
        output=folder / "run",
        init=init,
        preset=None if init else args.preset,
        steps=10_000,
        threads=args.threads,
        dtype=args.dtype,
        compile=args.compile,
        checkpoint_every=10_000,
        eval_every=0,
        tensorboard=False,
    )
    durations = []
    start = time.perf_counter()
    for report in train_steps(options):
        now = time.perf_counter()
        if report.step > 3:
            durations.append(now - start)
        start = now
        if len(durations) == args.steps:
            break
    return options.tokens_per_step / statistics.median(durations)


if __name__ == "__main__":
    main()
