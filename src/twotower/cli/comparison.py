"""Decodings of one prompt: timed without drawing, then side by side in one table."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.text import Text

from twotower.cli.tables import print_table
from twotower.engine import Completion, Event, Finished, GenerateOptions, stream
from twotower.lab.report import Table, number
from twotower.loading import Loaded

NAMES = {"diffusion": "Diffusion", "speculative": "Self-speculation"}  # at a sentence's start
_LEGEND = (
    "NFE, the number of function evaluations, counts passes of the denoiser tower; context "
    "forwards are passes of the context tower."
)
_COLUMNS = ("mode", "tokens/s", "NFE", "tokens/NFE", "context forwards", "seconds", "text")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One mode's result; `seconds` is the median over the timed runs, prefill included."""

    completion: Completion
    events: list[Event]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second."""
        return len(self.completion.tokens) / self.seconds

    @property
    def passes(self) -> int:
        """Forwards of either tower."""
        return self.completion.nfe + self.completion.context_forwards

    def as_json(self) -> dict[str, object]:
        """The figures as plain JSON values."""
        return {
            "tokens_per_s": self.tokens_per_s,
            "nfe": self.completion.nfe,
            "context_forwards": self.completion.context_forwards,
            "tokens_per_nfe": self.completion.tokens_per_nfe,
            "text": self.completion.text,
            "tokens": self.completion.tokens,
            "seconds": self.seconds,
            "finish_reason": self.completion.finish_reason,
        }


def measure(
    loaded: Loaded, prompt: str, modes: Mapping[str, GenerateOptions], repeats: int
) -> dict[str, Measured]:
    """Decode the prompt in every mode: once untimed, then `repeats` times in turn."""
    events: dict[str, list[Event]] = {}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for turn in range(repeats + 1):
        for mode, options in modes.items():
            start = time.perf_counter()
            events[mode] = list(stream(loaded.model, [prompt], options, loaded.tokenizer))
            if turn:
                seconds[mode].append(time.perf_counter() - start)
    return {
        mode: Measured(
            completion=_completion(events[mode]), events=events[mode], seconds=median(seconds[mode])
        )
        for mode in modes
    }


def _completion(events: list[Event]) -> Completion:
    last = events[-1]
    assert isinstance(last, Finished)
    return last.completion


def print_comparison(console: Console, results: Mapping[str, Measured]) -> None:
    """The table of all modes and what it says in words."""
    ar = results["ar"]
    rows = [
        [
            mode,
            f"{result.tokens_per_s:.0f}",
            str(result.completion.nfe),
            number(result.completion.tokens_per_nfe),
            str(result.completion.context_forwards),
            f"{result.seconds:.2f}",
            "same" if result.completion.text == ar.completion.text else "differs",
        ]
        for mode, result in results.items()
    ]
    print_table(console, Table("Compared", _COLUMNS, rows))
    console.print(f"\n{_LEGEND}\n")
    for mode, result in results.items():
        if mode != "ar":
            console.print(Text(summary(ar, result, NAMES.get(mode, mode))))


def summary(ar: Measured, other: Measured, name: str = "Diffusion") -> str:
    """What was measured, in plain words; says so when the other mode is the slower one."""
    ratio = other.tokens_per_s / ar.tokens_per_s
    is_same = ar.completion.text == other.completion.text
    speed = (
        f"{ratio:.1f} times as fast as" if ratio >= 1.0 else f"slower than AR, at {ratio:.0%} of"
    )
    owner = "AR" if ratio >= 1.0 else "its speed"
    return (
        f"{name} was {speed} {owner} here: {_passes(other)}, against {_passes(ar)}. "
        f"The texts are {'the same' if is_same else 'different'}."
    )


def _passes(result: Measured) -> str:
    return f"{result.passes} passes of {1000 * result.seconds / result.passes:.1f} ms"
