"""How fast is each mode on a GPU, and does it write what a CPU writes?

The shipped model in float32 on held-out prompts of the categories that need no other package, in
every mode, eager and recorded (CUDA graphs), 1 and 16 rows at a time; ar and speculative recorded
with int8 weights, too. A CPU writes the same prompts for comparison, with the same weights.

    PYTHONPATH=src python scripts/gpu/suite.py
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from picture import Record
from stage import Stage, reason_of, sync

from twotower import GenerateOptions, Tokenizer, TwoTower, accelerate, load_tokenizer
from twotower.backends import BackendName, Quantization
from twotower.checkpoint import load_checkpoint
from twotower.checkpoint.files import shipped_folder
from twotower.cli.scripts import script_parser
from twotower.engine import EngineOptions, Failed, Finished, stream
from twotower.lab.evaluate.suite import check, held_out
from twotower.lab.report import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CATEGORIES = ("math", "editing", "long_context", "refusal")
WAYS: tuple[tuple[BackendName, Quantization], ...]
WAYS = ("graphs", "none"), ("eager", "none"), ("graphs", "int8")
MODES = ("ar", "mock-ar", "diffusion", "posterior", "predict-and-noise", "speculative")


def write(
    model: TwoTower,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: GenerateOptions,
    rows: int,
) -> dict[int, Any]:
    """The completion of each prompt by its place; ValueError where one failed."""
    found = {}
    for event in stream(model, prompts, options, tokenizer, EngineOptions(batch_size=rows)):
        if isinstance(event, Failed):
            raise ValueError(f"row {event.row}: {event.message}") from event.error
        if isinstance(event, Finished):
            found[event.row] = event.completion
    return found


def paint(record: Record) -> "Figure":
    """Right answers and speed over AR by mode, a bar for each backend, weights and rows."""
    measured = [one for one in record["results"] if "tokens_per_s" in one]
    ways = list(dict.fromkeys((one["backend"], one["weights"], one["rows"]) for one in measured))
    figure = new_figure(11, 7.5)
    figure.suptitle("The shipped model in all modes")
    answers, speed = figure.subplots(2, sharex=True)
    for number, way in enumerate(ways):
        own = {
            one["mode"]: one
            for one in measured
            if (one["backend"], one["weights"], one["rows"]) == way
        }
        places = [MODES.index(mode) + (number - 2.5) * 0.14 for mode in own]
        backend, weights, rows = way
        name = f"{backend}{', int8' if weights == 'int8' else ''}, {rows} row{'s'[: rows - 1]}"
        # An outline shows bars of no height, too.
        look: dict[str, Any] = {"width": 0.11, "color": COLORS[number], "ec": COLORS[number]}
        right = [100 * one["right"] / one["prompts"] for one in own.values()]
        if "ar" in own:
            ar = own["ar"]["tokens_per_s"]
            name = f"{name}\n(AR: {ar:g} tokens/s)"
            speed.bar(places, [one["tokens_per_s"] / ar for one in own.values()], **look)
        answers.bar(places, right, label=name, **look)
    speed.axhline(1, color="black", linewidth=1)
    answers.set(ylabel="right answers, %", ylim=(-3, 105))
    speed.set(ylabel="tokens/s over those of AR (times)", xlabel="mode")
    speed.set_xticks(range(len(MODES)), MODES)
    for axes in (answers, speed):
        axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--items", type=int, default=8, help="prompts per category")
    stage = Stage("suite", parser, paint)
    items, num_tokens = (1, 6) if stage.is_rehearsal else (stage.args.items, 96)
    columns = [held_out(category, items, 0) for category in CATEGORIES]
    documents = [document for column in columns for document in column]
    prompts = [document.prompt for document in documents]
    folder = shipped_folder()
    tokenizer, reference = load_tokenizer(folder), load_checkpoint(folder)
    model = load_checkpoint(folder, context_device=stage.device, denoiser_device=stage.device)
    for mode in MODES:
        options = GenerateOptions(mode=mode, max_new_tokens=num_tokens)
        expected: dict[str, dict[int, Any]] = {}
        for backend, weights in WAYS:
            if weights == "int8" and mode not in ("ar", "speculative"):
                continue
            ready = accelerate(model, backend, weights)
            on_cpu = reference if weights == "none" else accelerate(reference, backend, weights)
            for rows in (1, 16):
                values = {"mode": mode, "backend": backend, "weights": weights, "rows": rows}
                if stage.is_over or stage.has(**values):
                    continue
                try:
                    if weights not in expected:
                        expected[weights] = write(on_cpu, tokenizer, prompts, options, 16)
                    write(ready, tokenizer, prompts, options, rows)  # warms up
                    sync(stage.device)
                    start = time.perf_counter()
                    found = write(ready, tokenizer, prompts, options, rows)
                    seconds = time.perf_counter() - start
                except (ValueError, RuntimeError) as error:
                    stage.add(**values, failed=reason_of(error))
                    continue
                tokens = sum(len(one.tokens) for one in found.values())
                passes = sum(one.nfe for one in found.values())
                stage.add(
                    **values,
                    prompts=len(prompts),
                    tokens_per_s=round(tokens / seconds, 1),
                    tokens_per_nfe=round(tokens / passes, 3) if passes else None,
                    equal_to_cpu=sum(found[i].tokens == expected[weights][i].tokens for i in found),
                    right=sum(check(documents[i], found[i].text).correct for i in found),
                )
    stage.close()
    failed = [one for one in stage.results if "failed" in one]
    print(f"{len(stage.results)} results, {len(failed)} failed: {stage.args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
