"""`twotower bench --quality`: the announcement's pair, quality and speed, in one paired run."""

import json
from dataclasses import dataclass

from rich.console import Console

from twotower.cli.evaluate import INTERRUPTED, EvaluateOptions, run_suite
from twotower.cli.evaluation_tables import describe_range
from twotower.cli.loading import Placement


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Placement):
    """How much of the AR quality a checkpoint keeps, and how much faster it is, in one run."""

    quality: bool = False
    """Quality kept and wall-clock ratio of diffusion against our own AR decoding of the same
    weights, modes taking turns on every prompt."""
    model: str | None = None
    """Checkpoint folder or hub id; the shipped model when not given."""
    items: int = 50
    """Held-out prompts per category."""
    seed: int = 0
    """Seed of the items and of the resampling."""
    threads: int | None = None
    """CPU threads; PyTorch's choice when not given."""
    json: bool = False
    """One JSON object on stdout instead of text."""

    def __post_init__(self) -> None:
        if not self.quality:
            raise ValueError("bench: say what to measure; --quality is all that there is so far")


def run(options: BenchOptions) -> int:
    """Measure and print the pair; returns the exit status."""
    results, _ = run_suite(
        EvaluateOptions(
            model=options.model,
            items=options.items,
            seed=options.seed,
            threads=options.threads,
            dtype=options.dtype,
            context_device=options.context_device,
            denoiser_device=options.denoiser_device,
        )
    )
    modes = results["modes"]
    assert isinstance(modes, dict)
    record = {name: value for name, value in results.items() if name not in ("sweep", "traces")}
    if options.json:
        print(json.dumps(record))
    else:
        Console().print(summary(modes["diffusion"], modes["ar"]), highlight=False)
    return 0 if results["complete"] else INTERRUPTED


def summary(diffusion: dict[str, object], ar: dict[str, object]) -> str:
    """The pair in two sentences, with what it was bought with."""
    retention, ratio = diffusion["retention"], diffusion["speed_ratio"]
    if retention is None:
        return "The AR baseline answers nothing right: there is no quality to keep."
    if ratio is None:
        return "A mode wrote no tokens: there is no speed to compare."
    low, high = describe_quartiles(diffusion["speed_ratio_quartiles"])
    passes = diffusion["tokens_per_nfe"]
    return (
        f"Keeps {100 * float(str(retention)):.1f} % of the AR quality "
        f"(95 %: {describe_range(diffusion['retention_interval'])}) "
        f"at {float(str(ratio)):.2f} times its speed (median of pairs; quartiles {low}, {high}).\n"
        f"AR {ar['correct']} of {ar['n']} right; diffusion {diffusion['correct']} of "
        f"{diffusion['n']}, {diffusion['nfe']} NFE, {float(str(passes)):.2f} tokens/NFE."
    )


def describe_quartiles(bounds: object) -> tuple[str, str]:
    assert isinstance(bounds, list)
    low, high = bounds
    return f"{low:.2f}", f"{high:.2f}"
