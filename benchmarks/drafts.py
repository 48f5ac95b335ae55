"""What drafts are worth on a real model: tokens a cycle and time, by task and by kind of draft.

Each prompt is decoded by every way in turn (a way that begins the odd prompts ends the even ones):
ar; lookup alone; the denoiser alone; both. All texts must be equal. With --always the denoiser
writes in every cycle, which tells how often drafts are right; else only where it pays, as users
have it. The last line is one JSON object.

Physical limit: a cycle is a draft and a verification, each at least the bytes of its weights over
the memory bandwidth or its operations over the arithmetic peak; T tokens a cycle cannot be faster
than T times an AR step over their sum.

    python benchmarks/drafts.py smollm2.gguf --denoiser DIR --quantization int8 \
        gsm8k=test.jsonl mt-bench=question.jsonl
"""

import json
import statistics
import time
from pathlib import Path

import twotower
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine import Completion, GenerateOptions, drafts_denoiser
from twotower.serve.chat import read_template

WAYS = ("ar", "lookup", "denoiser", "auto")


def prompts_of(file: Path, count: int) -> list[str]:
    """`count` prompts of a file of objects with a question, a prompt or turns, evenly spread."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = records[:: max(1, len(records) // count)][:count]
    return [r.get("question") or r.get("prompt") or r["turns"][0] for r in chosen]


def decode(
    model: twotower.TwoTower, prompt: list[int], way: str, most: int
) -> tuple[Completion, float]:
    """One prompt's text and seconds."""
    options = GenerateOptions(mode="ar", max_new_tokens=most)
    if way != "ar":
        options = GenerateOptions(mode="speculative", drafts=way, max_new_tokens=most)  # type: ignore[arg-type]
    began = time.perf_counter()
    (completion,) = twotower.generate(model, [prompt], options)
    return completion, time.perf_counter() - began


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("model", help="checkpoint folder, GGUF file or hub id")
    parser.add_argument(
        "tasks",
        nargs="+",
        metavar="NAME=FILE",
        help="name of a task and its file of prompts, as for twotower bench --prompts",
    )
    parser.add_argument(
        "--denoiser", help="folder of a thin denoiser; without one the model's own drafts"
    )
    parser.add_argument("--quantization", default="none", help="of the weights: none, int8 or int4")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of each task")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="maximum number of new tokens per prompt"
    )
    parser.add_argument(
        "--always",
        action="store_true",
        help="draft with the denoiser in every cycle, even where it does not pay",
    )
    given = parser.parse_args()
    if given.always:
        drafts_denoiser.pays = lambda *_: True
    model = twotower.load_model(
        given.model, denoiser=given.denoiser, quantization=given.quantization, threads=given.threads
    )
    model.pass_costs  # noqa: B018  # measured once on a machine, outside what is timed
    tokenizer = twotower.load_tokenizer(given.model)
    template = read_template(twotower.Placement(model=given.model).find())
    ways = [way for way in WAYS if given.denoiser or way in ("ar", "lookup")]
    result: dict[str, dict[str, object]] = {}
    for task in given.tasks:
        name, _, file = task.partition("=")
        found: dict[str, list[tuple[Completion, float]]] = {way: [] for way in ways}
        for number, text in enumerate(prompts_of(Path(file), given.prompts)):
            assert template is not None
            ids = template.encode([{"role": "user", "content": text}], None, tokenizer, 2**20)
            for way in ways if number % 2 else reversed(ways):
                found[way].append(decode(model, ids, way, given.max_tokens))
        result[name] = {way: summary(found[way], found["ar"]) for way in ways}
        for way, numbers in result[name].items():
            print(f"{name:12} {way:9} {numbers}", flush=True)
    shown = {**vars(given), "tasks": result}
    print(json.dumps({"recorded": recorded(), **shown}))


def summary(
    runs: list[tuple[Completion, float]], ar: list[tuple[Completion, float]]
) -> dict[str, object]:
    """Sums, and the median of each prompt's ratio to AR."""
    tokens = sum(len(completion.tokens) for completion, _ in runs)
    ratios = [plain[1] / own[1] for own, plain in zip(runs, ar, strict=True)]
    return {
        "tokens": tokens,
        "equal": sum(own[0].tokens == plain[0].tokens for own, plain in zip(runs, ar, strict=True)),
        "prompts": len(runs),
        "tokens_per_cycle": round(tokens / sum(c.context_forwards for c, _ in runs), 3),
        "nfe": sum(c.nfe for c, _ in runs),
        "seconds": round(sum(seconds for _, seconds in runs), 2),
        "x_ar": round(sum(s for _, s in ar) / sum(s for _, s in runs), 3),
        "x_ar_median": round(statistics.median(ratios), 3),
    }


if __name__ == "__main__":
    main()
