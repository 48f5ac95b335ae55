"""How long does one pass take: an AR step, a 16-token denoiser pass, a 16-token extension?

Physical limit: a pass streams the tower's weights once, so it takes at least their bytes over the
memory bandwidth, or its operations over the arithmetic peak where the weights stay in the cache.
Small models reach neither: they wait for Python and PyTorch's dispatch. Medians of interleaved
repeats; the last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

import twotower


def median_ms(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Times of each call in milliseconds, taken in turns so that a slow spell hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 3:  # warm-up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=twotower.__path__[0] + "/assets")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = twotower.load_model(args.model)
    size = model.config.block_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(4, model.config.vocab_size, (1, args.prompt_tokens), generator=generator)
    block = torch.full((1, size), model.config.mask_token_id)
    view = model.prefill(prompt).view()
    base = model.prefill(prompt)
    row = torch.tensor([0])
    calls = {
        "ar_step": lambda: model.extend(base.select(row), prompt[:, :1]),
        "extend": lambda: model.extend(base.select(row), prompt[:, :size]),
        "denoise_pass": lambda: model.denoise(block, view, torch.ones(1)),
        "copy_of_cache": lambda: base.select(row),  # contained in the first two
    }
    result = {
        "ms": median_ms(calls, args.repeats),
        "block_size": size,
        "threads": args.threads,
        "model": args.model,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    for name, times in result["ms"].items():
        print(f"{name:14s} {times['median']:8.3f} ms  ({times['min']:.3f} to {times['max']:.3f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
