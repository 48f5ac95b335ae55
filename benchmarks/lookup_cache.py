"""What does lookup gain from earlier answers? Tokens a cycle and time, ten by ten prompts.

One engine decodes the prompts in order, one at a time; ar, lookup without a lookup cache and lookup
with one take turns, prompt by prompt. All texts must be equal. The task `template` is built in: 60
prompts that differ in two words. With --denoiser lookup has that folder's n-grams as well. The last
line is one JSON object.

Physical limit: as of drafts.py: T tokens a cycle cannot be faster than T times an AR step over the
time of a verification.

    python benchmarks/lookup_cache.py smollm2.gguf --quantization int8 gsm8k=test.jsonl template
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import twotower
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine import (
    Completion,
    EngineOptions,
    Finished,
    GenerateOptions,
    Request,
    stream_requests,
)
from twotower.serve.chat import read_template

TEMPLATE = (
    "Write a JSON object with the keys name, color, price and description for a {} {} in a shop."
)
COLORS = ("red", "green", "blue", "yellow", "black", "white")
THINGS = ("lamp", "chair", "scarf", "teapot", "bicycle", "notebook", "tent", "clock", "mug", "coat")
AR = GenerateOptions(mode="ar", temperature=0)
LOOKUP = GenerateOptions(mode="speculative", drafts="lookup", temperature=0)
OFF = EngineOptions(batch_size=1, lookup_cache_bytes=0)
WAYS = {"ar": (AR, OFF), "alone": (LOOKUP, OFF), "learns": (LOOKUP, EngineOptions(batch_size=1))}


def prompts_of(task: str, count: int) -> list[str]:
    """The first prompts of a task: `template`, or NAME=FILE."""
    if task == "template":
        pairs = zip(itertools.cycle(COLORS), (t for t in THINGS for _ in COLORS), strict=False)
        return [TEMPLATE.format(*pair) for pair in pairs][:count]
    lines = Path(task.partition("=")[2]).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[:count]]
    return [r.get("question") or r.get("prompt") or r["turns"][0] for r in records]


def decode(
    model: twotower.TwoTower, prompts: Sequence[list[int]], way: str, most: int
) -> Iterator[tuple[Completion, float]]:
    """Each prompt's text and seconds of processor time, all in one engine."""
    options, engine = WAYS[way]
    given = GenerateOptions(**{**options.given(), "max_new_tokens": most})
    began = time.process_time()
    for event in stream_requests(model, [Request(p, given) for p in prompts], None, engine):
        if isinstance(event, Finished):
            yield event.completion, time.process_time() - began
            began = time.process_time()  # others had their turn


def summary(runs: Sequence[tuple[Completion, float]]) -> dict[str, float]:
    """Of some prompts."""
    tokens = sum(len(done.tokens) for done, _ in runs)
    return {
        "tokens": tokens,
        "tokens_per_cycle": round(tokens / sum(done.context_forwards for done, _ in runs), 3),
        "seconds": round(sum(seconds for _, seconds in runs), 2),
    }


def measure(
    model: twotower.TwoTower, name: str, prompts: Sequence[list[int]], most: int
) -> dict[str, object]:
    """All ways in turns; a way that begins the odd prompts ends the even ones."""
    passes = {way: decode(model, prompts, way, most) for way in WAYS}
    found: dict[str, list[tuple[Completion, float]]] = {way: [] for way in WAYS}
    tens: list[dict[str, dict[str, float]]] = []
    for number in range(1, len(prompts) + 1):
        for way in WAYS if number % 2 else reversed(WAYS):
            found[way].append(next(passes[way]))
        if number % 10 == 0:
            tens.append({way: summary(runs[-10:]) for way, runs in found.items()})
            print(f"{name:10} {number:4} {tens[-1]}", flush=True)
    equal = sum(len({tuple(done.tokens) for done, _ in runs}) == 1 for runs in zip(*found.values()))  # noqa: B905
    result = {"prompts": len(prompts), "equal": equal, "tens": tens}
    result |= {way: summary(runs) for way, runs in found.items()}
    print(f"{name:10}  all {dict(itertools.islice(result.items(), 3, None))} equal {equal}")
    return result


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("model", help="checkpoint folder, GGUF file or hub id")
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="template, or NAME=FILE")
    parser.add_argument("--denoiser", help="folder of a thin denoiser, for its n-grams")
    parser.add_argument("--quantization", default="none", help="of the weights: none, int8 or int4")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    parser.add_argument("--prompts", type=int, default=60, help="prompts of each task")
    parser.add_argument("--max-tokens", type=int, default=256, help="new tokens per prompt")
    given = parser.parse_args()
    model = twotower.load_model(
        given.model, denoiser=given.denoiser, quantization=given.quantization, threads=given.threads
    )
    model.pass_costs  # noqa: B018  # measured once on a machine, outside what is timed
    tokenizer = twotower.load_tokenizer(given.model)
    template = read_template(twotower.Placement(model=given.model).find())
    assert template is not None
    result = {}
    for task in given.tasks:
        texts = prompts_of(task, given.prompts)
        turns = [[{"role": "user", "content": text}] for text in texts]
        prompts = [template.encode(turn, None, tokenizer, 2**20) for turn in turns]
        name = task.partition("=")[0]
        result[name] = measure(model, name, prompts, given.max_tokens)
    print(json.dumps({"recorded": recorded(), **vars(given), "tasks": result}))


if __name__ == "__main__":
    main()
