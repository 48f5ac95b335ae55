"""A recorded decoding as pictures for a terminal, one for each step; nothing here is timed."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from rich.cells import set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from twotower.cli.text import printable
from twotower.engine import Event, StepTaken, TokensCommitted
from twotower.tokenizer import Tokenizer

TITLES = {
    "diffusion": "Diffusion: masked blocks, filled in parallel",
    "speculative": "Self-speculation: drafts in one pass, accepted while AR agrees",
    "ar": "AR: the context tower alone, token by token",
}
STEP_S, BLOCK_S, TOKEN_S = 0.18, 0.5, 0.035  # how long a picture stays at speed 1
_CELLS_PER_LINE = 8
_CELL_WIDTH = 10  # at most
# Confidence at which a band ends, its colour, its name in the legend.
_BANDS = (
    (0.5, "red", "<50%"),
    (0.8, "yellow", "50-80%"),
    (0.95, "green", "80-95%"),
    (2.0, "cyan", ">95%"),
)


@dataclass(frozen=True)
class Frame:
    """A picture and how long it is to be seen at speed 1."""

    picture: RenderableType
    wait_s: float


@dataclass(frozen=True)
class Scene:
    """What every picture of one prompt needs."""

    prompt: str
    tokenizer: Tokenizer
    width: int  # of the terminal, in characters
    has_colour: bool


def play(console: Console, frames: Iterable[Frame], speed: float) -> None:
    """Show the frames in place, `speed` times as fast as written; the last one stays."""
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for frame in frames:
            live.update(frame.picture, refresh=True)
            time.sleep(frame.wait_s / speed)
    console.print()


def block_frames(scene: Scene, events: Iterable[Event], mode: str = "diffusion") -> Iterator[Frame]:
    """The cells of a block fill in place, then what stands of it joins the text."""
    text, status, num_tokens = "", "", 0
    block = _Block([], [], [])
    picture = partial(_block_picture, scene, mode)
    for event in events:
        if isinstance(event, StepTaken):
            if event.step == 0:
                block = _Block.empty(len(event.tokens))
                yield Frame(picture(text, block, f"{status} ".lstrip()), STEP_S)
            before, block = block, _Block(event.tokens, event.is_masked, event.confidence)
            status = f"block {event.block_index + 1}, step {event.step + 1}: NFE {event.nfe}"
            yield Frame(picture(text, block, status, before.is_masked), STEP_S)
        elif isinstance(event, TokensCommitted):
            text += event.text
            num_tokens += len(event.tokens)
            status = f"{num_tokens} tokens, NFE {event.nfe}"
            yield Frame(picture(text, block.agreeing(event.tokens), status), BLOCK_S)
    yield Frame(_text_picture(scene, mode, text, status), 0.0)


def token_frames(scene: Scene, events: Iterable[Event], mode: str = "ar") -> Iterator[Frame]:
    """The text grows by a token."""
    text, status, num_tokens = "", "", 0
    for event in events:
        if isinstance(event, TokensCommitted):
            text += event.text
            num_tokens += len(event.tokens)
            status = f"{num_tokens} tokens, {event.context_forwards} context forwards"
            yield Frame(_text_picture(scene, mode, text, status), TOKEN_S)


@dataclass(frozen=True)
class _Block:
    """What the cells show; lists of one entry per position, shorter once the block was cut."""

    tokens: list[int]
    is_masked: list[bool]
    confidence: list[float]

    @classmethod
    def empty(cls, size: int) -> "_Block":
        return cls([0] * size, [True] * size, [0.0] * size)

    def agreeing(self, tokens: list[int]) -> "_Block":
        """The first cells, as far as they hold what was committed."""
        pairs = zip(self.tokens, tokens, strict=False)  # a draft may be longer, or shorter by one
        size = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return _Block(self.tokens[:size], self.is_masked[:size], self.confidence[:size])


def _text_picture(scene: Scene, mode: str, text: str, status: str) -> Group:
    body = Text(printable(scene.prompt), style="dim")
    body.append(printable(text), style="not dim bold")
    return Group(Text(TITLES[mode], style="bold underline"), body, Text(status, style="italic"))


def _block_picture(
    scene: Scene,
    mode: str,
    text: str,
    block: _Block,
    status: str,
    was_masked: list[bool] | None = None,
) -> Group:
    """The text so far and the block below it; newly filled cells are underlined."""
    cells = Table.grid(padding=(0, 1, 0, 0))
    width = min(_CELL_WIDTH, scene.width // _CELLS_PER_LINE - 1)
    row: list[Text] = []
    for at in range(len(block.tokens)):
        is_new = was_masked is not None and was_masked[at] and not block.is_masked[at]
        row.append(_cell(scene, block, at, width, is_new))
        if len(row) == _CELLS_PER_LINE or at + 1 == len(block.tokens):
            cells.add_row(*row)
            row = []
    picture = _text_picture(scene, mode, text, status)
    return Group(*picture.renderables, Text(), cells, Text(), _legend(scene))


def _cell(scene: Scene, block: _Block, at: int, width: int, is_new: bool) -> Text:
    if block.is_masked[at]:
        return Text("." * width, style="dim")
    shown = printable(scene.tokenizer.token_text(block.tokens[at])).replace("\n", "\\n")
    colour = next(name for limit, name, _ in _BANDS if block.confidence[at] < limit)
    style = f"black on {colour}" if scene.has_colour else ""
    return Text(set_cell_size(shown, width), style=style + (" bold underline" if is_new else ""))


def _legend(scene: Scene) -> Text:
    legend = Text("... masked", style="dim")
    if scene.has_colour:
        legend.append("  confidence:", style="not dim")
        for _, colour, name in _BANDS:
            legend.append(" ")
            legend.append(f" {name} ", style=f"not dim black on {colour}")
        return legend
    return legend.append("  underlined: filled by this step")
