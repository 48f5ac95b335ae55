"""Draw docs/demo.svg: the shipped model filling blocks, as `twotower demo` shows it in a terminal.

Every frame is a real step of one run, exported by rich; CSS shows them one after the other.
Run again when the model or the demo's look changes: python scripts/make_demo_picture.py
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

import twotower
from twotower.checkpoint import load_checkpoint
from twotower.checkpoint.files import shipped_folder
from twotower.cli.demo import SAMPLES
from twotower.cli.replay import Scene, block_frames
from twotower.engine import GenerateOptions, stream

WIDTH, PACE = 96, 0.45  # characters; slower than in the terminal
LINES = 16


def main(target: str = "docs/demo.svg", sample: str = "tools") -> None:
    path = shipped_folder()
    model, tokenizer = load_checkpoint(path), twotower.load_tokenizer(path)
    prompt = SAMPLES[sample]  # type: ignore[index]  # one of the demo's own names
    options = GenerateOptions(mode="diffusion", max_new_tokens=96)
    events = list(stream(model, [prompt], options, tokenizer))
    scene = Scene(prompt, tokenizer, WIDTH, has_colour=True)
    frames = list(block_frames(scene, events))
    waits = [frame.wait_s / PACE for frame in frames[:-1]] + [3.0]
    drawings = [draw(frame.picture, number) for number, frame in enumerate(frames)]
    Path(target).write_text(animate(drawings, waits), encoding="utf-8")


def draw(picture: object, number: int) -> str:
    """One frame as a complete SVG, padded to the same number of lines."""
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    lines = console.render_lines(picture, pad=False)  # type: ignore[arg-type]  # a renderable
    console.print(picture)
    console.print("\n" * max(0, LINES - len(lines)))
    return console.export_svg(title="twotower demo", unique_id=f"f{number}")


def animate(drawings: list[str], waits: list[float]) -> str:
    """Stack the frames; each is visible in its own stretch of one common period."""
    total = sum(waits)
    box = max(
        (re.search(r'viewBox="([^"]*)"', drawing).group(1) for drawing in drawings),  # type: ignore[union-attr]
        key=lambda value: float(value.split()[3]),
    )
    rules, bodies, start = [], [], 0.0
    for number, (drawing, wait) in enumerate(zip(drawings, waits, strict=True)):
        begin, end = 100 * start / total, 100 * (start + wait) / total
        rules.append(
            f"@keyframes k{number}{{0%,{begin:.3f}%{{visibility:hidden}}"
            f"{begin + 1e-3:.3f}%,{end:.3f}%{{visibility:visible}}"
            f"{min(end + 1e-3, 100):.3f}%,100%{{visibility:hidden}}}}"
            f".k{number}{{visibility:hidden;animation:k{number} {total:.2f}s step-end infinite}}"
        )
        bodies.append(f'<g class="k{number}">{drawing}</g>')
        start += wait
    style = "<style>" + "".join(rules) + "</style>"
    header = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
    return header + style + "".join(bodies) + "</svg>\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
