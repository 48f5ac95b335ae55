"""How many tokens a second do 1, 2, 4, 8 and 16 rows give in each mode, all in the same scheduler?

Physical limit: a pass over more rows streams the weights once for all of them, so tokens/s grow
with the rows until arithmetic, not memory or dispatch, is what takes the time; AR decoding, which
has one token a row and pass, gains most. Held-out prompts of the project's own corpus; modes and
numbers of rows take turns, so that a slow spell hits all; medians. One thread is measured in
processor time, which neighbours change least. `--overlap on` uses a thread per tower: give it as
many cores as threads. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

import twotower
from twotower.backends import BACKENDS, accelerate
from twotower.checkpoint import load_checkpoint
from twotower.checkpoint.files import shipped_folder
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine import EngineOptions, Finished, stream
from twotower.lab.evaluate.suite import held_out

MODES = ("ar", "diffusion", "speculative")
ROWS = (1, 2, 4, 8, 16)


def draw_prompts(count: int) -> list[str]:
    """Prompts of four categories in turns."""
    columns = [held_out(name, count, 0) for name in ("math", "code", "tools", "knowledge")]
    return [columns[i % 4][i // 4].prompt for i in range(count)]


def run_once(
    model: twotower.TwoTower,
    tokenizer: twotower.Tokenizer,
    prompts: list[str],
    options: twotower.GenerateOptions,
    engine: EngineOptions,
) -> tuple[float, int]:
    """Seconds and tokens of all prompts, `batch_size` at a time."""
    is_alone = torch.get_num_threads() == 1 and engine.overlap == "off"
    clock = time.process_time if is_alone else time.perf_counter
    start = clock()
    events = stream(model, prompts, options, tokenizer, engine)
    tokens = sum(len(e.completion.tokens) for e in events if isinstance(e, Finished))
    return clock() - start, tokens


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="shipped", help="checkpoint folder, or shipped")
    parser.add_argument("--prompts", type=int, default=32, help="number of prompts")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="tokens decoded after each prompt"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    parser.add_argument(
        "--overlap",
        nargs="+",
        choices=("off", "on"),
        default=["off"],
        help="whether both towers run at the same time",
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs forward passes"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=list(ROWS),
        help="batch sizes: sequences decoded at the same time",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = shipped_folder() if args.model == "shipped" else Path(args.model)
    model = accelerate(load_checkpoint(path), args.backend)
    tokenizer = twotower.load_tokenizer(path)
    prompts = draw_prompts(args.prompts)
    cases = [(q, mode, rows) for q in args.overlap for mode in MODES for rows in args.rows]
    rates: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    for repeat in range(args.repeats + 1):
        for overlap, mode, rows in cases:
            options = twotower.GenerateOptions(mode=mode, max_new_tokens=args.new_tokens)
            # With few rows later prompts could learn from earlier ones, with many they could not.
            engine = EngineOptions(batch_size=rows, overlap=overlap, lookup_cache_bytes=0)
            seconds, tokens = run_once(model, tokenizer, prompts, options, engine)
            if repeat:  # the first is warm-up
                rates[overlap, mode, rows].append(tokens / seconds)
    report(args, cases, rates)


def report(
    args: argparse.Namespace,
    cases: list[tuple[str, str, int]],
    rates: dict[tuple[str, str, int], list[float]],
) -> None:
    """A table and the JSON line."""
    results = []
    for overlap, mode, rows in cases:
        own = rates[overlap, mode, rows]
        median = statistics.median(own)
        ratio = median / statistics.median(rates[args.overlap[0], "ar", rows])
        results.append(
            {
                "overlap": overlap,
                "mode": mode,
                "rows": rows,
                "tokens_per_s": {"median": median, "min": min(own), "max": max(own)},
                "ratio_to_ar": ratio,
            }
        )
        print(
            f"{overlap:3s} {mode:12s} {rows:3d} rows {median:8.0f} tokens/s "
            f"({min(own):.0f} to {max(own):.0f}), {ratio:.2f} times AR"
        )
    settings = {**vars(args), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    print(json.dumps({"recorded": recorded(), "results": results, "settings": settings}))


if __name__ == "__main__":
    main()
