"""`twotower demo`: one prompt decoded in blocks, in verified drafts and token by token; compared.

Times are taken first, without drawing; what is shown afterwards is a recording, slowed down so
that people can follow it.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from rich.console import Console
from rich.text import Text

from twotower.arguments import ABOVE_ZERO, COUNT, check_fields
from twotower.cli.comparison import Measured, measure, print_comparison
from twotower.cli.decoding import TextOptions, by_mode, decoding_flags, has_any_denoiser
from twotower.cli.progress import load_with_bar
from twotower.cli.prompts import read_argument
from twotower.cli.replay import TITLES, Scene, block_frames, play, token_frames
from twotower.cli.text import printable
from twotower.engine import GenerateOptions, Mode
from twotower.loading import Loaded, Placement, placement_of

Sample = Literal["math", "code", "editing", "tools", "knowledge"]
# Held-out documents of the built-in corpus: their keys are not in its training split.
SAMPLES: dict[Sample, str] = {
    "math": "Q: Zoe has 70 buttons. She buys 10 more and loses 15. "
    "How many buttons does Zoe have now?\nA:",
    "code": "# Return the items of numbers that are at most 73.\ndef at_most(numbers):",
    "editing": "Edit: Rename data to values.\ndef find(data):\n    if 8 in data:\n"
    "        return data.index(8)\n    return -1\nEdited:\n",
    "tools": "Tools:\ntranslate(text: string, language: string)\n"
    "book_flight(from: string, to: string, date: string)\n"
    "User: Book a flight from Lima to Madrid on 2025-07-23.\nCall:",
    "knowledge": "Question: What money do people use in Vietnam?\nAnswer:",
}

MODES: tuple[Mode, ...] = ("diffusion", "speculative", "ar")
# What none of the modes uses, or the table does not show; the length is the demo's own.
_LEFT_OUT = ("mode", "max_new_tokens", "logprobs", "schedule", "remask", "adaptive")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(TextOptions, Placement):
    """Watch the model fill blocks of text, then draft blocks that the context tower verifies, then
    write token by token; a table compares the three. Needs no arguments and no network.

    A decoding option is given to each of the three modes that uses it. Its default is the
    checkpoint's (generation_config.json), else the one shown.
    """

    sample: Sample | None = None
    """Built-in prompt to complete; the model was not trained on it. Default: tools."""
    prompt: str | None = None
    """A prompt of your own instead."""
    escape: bool = False
    r"""Replace \n, \t and \\ in --prompt and --stop by line break, tab and backslash."""
    max_new_tokens: int = 96
    """Maximum number of new tokens."""
    repeats: int = 3
    """Timed runs of each mode, after one that is not timed; the median counts."""
    speed: float = 1.0
    """Playback speed in a terminal, 2 for twice as fast; the timings do not depend on it."""
    json: bool = False
    """Print one JSON object instead of text."""
    decoding: Annotated[dict[str, object], decoding_flags(*_LEFT_OUT)]
    """How to decode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modes()
        if self.escape and self.prompt is None and not self.stop:
            raise ValueError("escape: no effect without --prompt or --stop; leave it out")
        if self.sample is not None and self.prompt is not None:
            raise ValueError("sample: has no effect with --prompt; leave one of them out")
        check_fields(self, {"repeats": COUNT, "speed": ABOVE_ZERO})

    @cached_property
    def given(self) -> dict[str, object]:
        """The decoding options that were named, and how long the texts become."""
        return self.named(self.decoding, self.escape) | {"max_new_tokens": self.max_new_tokens}

    def modes(self) -> dict[str, GenerateOptions]:
        """Each mode with the options that it uses."""
        return by_mode(MODES, self.given)


def run(options: DemoOptions) -> int:
    """Run the demo; returns the exit status. Errors of the user arrive as ValueError."""
    prompt = SAMPLES[options.sample or "tools"]
    if options.prompt is not None:
        prompt = read_argument(options.prompt, "the prompt", options.escape)
    if not has_any_denoiser(options):
        raise ValueError(
            f"model={options.name} has no denoiser, which this shows; give one with --denoiser "
            "DIR, or another model"
        )
    loaded = load_with_bar(placement_of(options), "diffusion", only_decodes=True)
    with Console(stderr=True).status("decoding, to take the times ..."):
        results = measure(loaded, prompt, options.modes(), options.repeats)
    if options.json:
        print(json.dumps(_record(loaded.name, prompt, results), indent=2))
        return 0
    console = Console(highlight=False)
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        _show(console, loaded, prompt, results, options.speed)
    else:
        _print(console, prompt, results)
    print_comparison(console, results)
    return 0


def _show(
    console: Console, loaded: Loaded, prompt: str, results: Mapping[str, Measured], speed: float
) -> None:
    assert loaded.tokenizer is not None
    has_colour = console.color_system is not None and not console.no_color
    scene = Scene(prompt, loaded.tokenizer, console.width, has_colour)
    for mode, result in results.items():
        frames = token_frames if mode == "ar" else block_frames
        play(console, frames(scene, result.events, mode), speed)


def _print(console: Console, prompt: str, results: Mapping[str, Measured]) -> None:
    """Prompt and texts without motion."""
    texts = {mode: result.completion.text or "" for mode, result in results.items()}
    for title, text in [("Prompt", prompt), *((TITLES[mode], texts[mode]) for mode in texts)]:
        console.print(Text(title, style="bold"))
        console.print(Text(printable(text)), soft_wrap=True)
        console.print()


def _record(model: str, prompt: str, results: Mapping[str, Measured]) -> dict[str, object]:
    texts = {result.completion.text for result in results.values()}
    return {
        "model": model,
        "prompt": prompt,
        "modes": {mode: result.as_json() for mode, result in results.items()},
        "same_text": len(texts) == 1,
    }
