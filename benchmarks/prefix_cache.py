"""What does a known beginning save, and does any text change?

Limit: what follows the beginning must be read. Prompts share a beginning that the model has written
itself. Processor seconds of its prefill: as plain decoding reads it, in the cache's pieces with
nothing known, and with the beginning known; medians, one thread, no matter what else runs. Then
texts of every mode: cache with hits, without, and plain. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

import twotower
from twotower import ContextCache, GenerateOptions, TwoTower, accelerate, generate
from twotower.checkpoint import load_checkpoint
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine import EngineOptions
from twotower.engine.prefix_cache import PrefixCache

PLENTY = 10**9
Result = TypeVar("Result")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--model", help="checkpoint folder; without it the shipped model")
    parser.add_argument(
        "--backends", nargs="+", default=["eager", "native"], help="what runs forward passes"
    )
    parser.add_argument(
        "--shared",
        type=int,
        nargs="+",
        default=[64, 256, 1024],
        help="tokens of the beginning that prompts share",
    )
    parser.add_argument("--own", type=int, default=24, help="tokens of each prompt after it")
    parser.add_argument("--prompts", type=int, default=12, help="number of prompts")
    parser.add_argument(
        "--new-tokens", type=int, default=32, help="tokens decoded after each prompt"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = load_checkpoint(args.model or twotower.__path__[0] + "/assets")
    beginning = written(plain, max(args.shared))
    rows = []
    for backend in args.backends:
        model = accelerate(plain, backend)
        for shared in args.shared:
            row = {
                "backend": backend,
                "shared": shared,
                **seconds(model, beginning, shared, args),
            }
            rows.append(row)
            print(row, flush=True)
        texts = compare(model, beginning[: args.shared[0] + 1], args)
        print(backend, texts, flush=True)
        rows.append({"backend": backend, "texts": texts})
    print(json.dumps({"recorded": recorded(), "options": vars(args), "rows": rows}))


def written(model: TwoTower, length: int) -> list[int]:
    """A text of the model's own."""
    o = GenerateOptions(mode="ar", max_new_tokens=length, temperature=1.0, ignore_eos=True)
    return generate(model, [[1]], o)[0].tokens


def own_part(model: TwoTower, seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, model.config.vocab_size, (length,), generator=generator).tolist()


def seconds(
    model: TwoTower, beginning: list[int], shared: int, args: argparse.Namespace
) -> dict[str, object]:
    """Medians of the prefill of one prompt, and whether the known beginning changed a bit of it."""
    known = PrefixCache(model, PLENTY)
    known.read(beginning[:shared])
    times: dict[str, list[float]] = {"plain_s": [], "cold_s": [], "known_s": []}
    num_known, is_equal = 0, True
    for seed in range(args.repeats):
        prompt = beginning[:shared] + own_part(model, seed, args.own)
        ids = torch.tensor([prompt])
        timed(times["plain_s"], lambda ids=ids: model.prefill(ids))
        cold = timed(times["cold_s"], lambda p=prompt: PrefixCache(model, PLENTY).read(p))[0]
        cache, num_known = timed(times["known_s"], lambda p=prompt: known.read(p))
        is_equal &= same_bits(cache, cold)
    medians = {name: round(statistics.median(values), 5) for name, values in times.items()}
    num_bytes = PrefixCache(model, PLENTY)
    num_bytes.read(prompt)
    size = num_bytes.stats.cache_bytes
    return {**medians, "known_tokens": num_known, "bit_equal": is_equal, "cache_bytes": size}


def timed(times: list[float], work: Callable[[], Result]) -> Result:
    start = time.process_time()
    found = work()
    times.append(time.process_time() - start)
    return found


def same_bits(one: ContextCache, two: ContextCache) -> bool:
    pairs = zip(one.layers, two.layers, strict=True)
    parts = [pair for a, b in pairs if a and b for pair in zip(a, b, strict=True)]
    assert one.last_hidden is not None and two.last_hidden is not None
    return all(torch.equal(a, b) for a, b in [*parts, (one.last_hidden, two.last_hidden)])


def compare(
    model: TwoTower, beginning: list[int], args: argparse.Namespace
) -> dict[str, dict[str, int]]:
    """Prompts whose text with hits equals that without hits, and that of plain decoding."""
    prompts = [beginning + own_part(model, seed, args.own) for seed in range(args.prompts)]
    found = {}
    for mode in ("ar", "diffusion", "speculative"):
        o = GenerateOptions(mode=mode, max_new_tokens=args.new_tokens, ignore_eos=True)
        cached = EngineOptions(batch_size=1, prefix_cache_bytes=PLENTY)
        hits = generate(model, prompts, o, engine=cached)
        cold = [generate(model, [prompt], o, engine=cached)[0] for prompt in prompts]
        plain = generate(model, prompts, o, engine=EngineOptions(batch_size=1))
        found[mode] = {
            "prompts": len(prompts),
            "with_hits": sum(row.cached_tokens > 0 for row in hits),
            "as_without_hits": sum(a.tokens == b.tokens for a, b in zip(hits, cold, strict=True)),
            "as_plain": sum(a.tokens == b.tokens for a, b in zip(hits, plain, strict=True)),
        }
    return found


if __name__ == "__main__":
    main()
