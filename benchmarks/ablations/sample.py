"""What does each part of block decoding give a trained model? One thing is changed at a time.

The control is block decoding as published, whatever the checkpoint prefers: a block's first token
by the context tower, or its verification, would hide what is taken from the denoiser. The limit is
its context tower, token by token ("ar"), on the same held-out prompts. Accuracy and tokens/NFE do
not depend on the batch size, seconds do: the latter are no result here. The last line is one JSON
object.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.ablations import interventions
from benchmarks.ablations.scoring import RESULTS, Record, judge, merge, to_record, write
from rich.console import Console
from rich.progress import Progress

import twotower
from twotower.checkpoint import load_checkpoint
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine import MODES, GenerateOptions, defaults_of, resolve_options
from twotower.engine.resolved import FIELD_MODES
from twotower.lab.corpus import CATEGORIES, Document
from twotower.lab.evaluate.run import Item, draw_groups
from twotower.train.run_folder import versions

BLOCK_SIZES = (8, 16, 32, 64)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PASSES = 4  # per block, where the number is fixed
# Prompts of thousands of tokens would take most of the time.
SHORT_CATEGORIES = tuple(name for name in CATEGORIES if name != "long_context")
Wrap = Callable[[Any], Any]
CONTROL = "diffusion"


def settings_of(table: str, options: Callable[..., GenerateOptions]) -> Mapping[str, Any]:
    """Settings by name: options alone, or with what is done to the model."""
    changed = {
        "seed": {
            "no SSM seed": interventions.zero_seed(conv=False),
            "no conv seed": interventions.zero_seed(ssm=False),
            "no Mamba seed": interventions.zero_seed(),
            "no keys": interventions.hide_keys,
        },
        "t": {
            "t = 1": interventions.freeze_t(1.0),
            "t = 0.5": interventions.freeze_t(0.5),
            "no t": interventions.freeze_t(None),
        },
    }
    if table in changed:
        return {name: (options(), change) for name, change in changed[table].items()}
    if table == "blocks":
        # As many passes as tokens are allowed, so that the block size alone is varied.
        return {f"block {n}": options(block_size=n, steps_per_block=n) for n in BLOCK_SIZES}
    if table == "threshold":
        return {f"threshold {x:g}": options(confidence_threshold=x) for x in THRESHOLDS}
    noisy = {"mode": "predict-and-noise", "steps_per_block": PASSES}
    return {
        "one pass": options(steps_per_block=1),
        "guesses stay": options(),
        "4 passes, threshold": options(steps_per_block=PASSES),
        "4 passes, re-mask least sure": options(**noisy),
        "4 passes, re-mask least margin": options(**noisy, remask="margin"),
        "4 passes, re-mask at random": options(**noisy, remask="random"),
    }


TABLES = ("blocks", "seed", "t", "remask", "threshold")


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="block_size=.* is larger")  # that is the question
    begin = time.perf_counter()
    path = args.model or twotower.__path__[0] + "/assets"
    model, tokenizer = load_checkpoint(path), twotower.load_tokenizer(path)
    categories = tuple(args.categories.split(","))
    groups = draw_groups(categories, args.items, args.seed, args.batch_size)
    options = choose_options(args.threshold, args.max_new_tokens)
    tables = args.tables.split(",")
    control = resolve_options(options(), defaults_of(model))
    record: Record = {
        "name": args.name,
        "asked": {key: value for key, value in vars(args).items() if key != "results"},
        "block_size": model.config.block_size,
        "confidence_threshold": control.confidence_threshold,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recorded": recorded(),
        "versions": versions(),
    }
    references = run(model, tokenizer, {"ar": options(mode="ar"), CONTROL: options()}, groups)
    for table in tables:  # a record each: an interrupted run keeps its tables
        jobs = settings_of(table, options)
        items = merge(references, run(model, tokenizer, jobs, groups))
        record |= {
            "tables": {table: list(jobs)},
            "seconds": time.perf_counter() - begin,
            **to_record(items, args.seed),
        }
        write(record, args.results / f"sample-{args.name}-{table}.json")
        print_table(record)
    print(json.dumps({"name": args.name, "tables": tables, "seconds": record["seconds"]}))


def parser() -> argparse.ArgumentParser:
    found = script_parser(__doc__, "python -m benchmarks.ablations.sample")
    found.add_argument("--model", help="checkpoint folder; without it the shipped model")
    found.add_argument("--name", default="shipped", help="name of the record")
    found.add_argument(
        "--tables", default=",".join(TABLES), help="tables to measure, separated by commas"
    )
    found.add_argument(
        "--categories",
        default=",".join(SHORT_CATEGORIES),
        help="categories of prompts, separated by commas",
    )
    found.add_argument("--items", type=int, default=60, help="prompts of each category")
    found.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    found.add_argument(
        "--threshold", type=float, help="confidence threshold; without it the checkpoint's"
    )
    found.add_argument(
        "--max-new-tokens", type=int, default=128, help="maximum number of new tokens per prompt"
    )
    found.add_argument(
        "--batch-size", type=int, default=30, help="sequences decoded at the same time"
    )
    found.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    found.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    return found


def choose_options(threshold: float | None, max_new_tokens: int) -> Callable[..., GenerateOptions]:
    """A maker of options: the control's, but for what it is given."""
    fixed: dict[str, Any] = {
        "mode": "diffusion",
        "max_new_tokens": max_new_tokens,
        "first_token": "denoiser",
        "verify_threshold": 0.0,
    }
    if threshold is not None:
        fixed["confidence_threshold"] = threshold

    def make(**given: Any) -> GenerateOptions:
        values = {**fixed, **given}
        used = {n for n in values if values["mode"] in FIELD_MODES.get(n, MODES)}
        return GenerateOptions(**{name: values[name] for name in used})

    return make


def run(
    model: Any, tokenizer: Any, jobs: Mapping[str, Any], groups: Sequence[Sequence[Document]]
) -> list[Item]:
    """Items with the answers of every job: options alone, or with what is done to the model."""
    items: list[Item] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(jobs) * sum(map(len, groups)))
        for name, job in jobs.items():
            option, change = job if isinstance(job, tuple) else (job, None)
            subject = model if change is None else interventions.Intervened(model, change)
            chosen = groups
            if name == "guesses stay":
                subject = interventions.GuessesStay(model)
                chosen = [[document] for group in groups for document in group]
            answered = []
            for item in judge(subject, tokenizer, {name: option}, chosen):
                answered.append(item)
                bar.update(task, advance=1, description=name)
            items = merge(items, answered) if items else answered
    return items


def print_table(record: Mapping[str, Any]) -> None:
    print(f"{'setting':32s} {'accuracy':>9s} {'95 %':>13s} {'tokens/NFE':>11s}")
    for name, row in record["modes"].items():
        low, high = row["interval"]
        passes = "-" if row["tokens_per_nfe"] is None else f"{row['tokens_per_nfe']:.2f}"
        bounds = f"{100 * low:.1f} to {100 * high:.1f}"
        print(f"{name:32s} {100 * row['accuracy']:9.1f} {bounds:>13s} {passes:>11s}")


if __name__ == "__main__":
    main()
