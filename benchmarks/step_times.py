"""How long does one pass take: an AR step, a 16-token denoiser pass, a 16-token extension?

Physical limit: a pass streams the tower's weights once, so it takes at least their bytes over the
memory bandwidth, or its operations over the arithmetic peak where the weights stay in the cache.
Small models reach neither: they wait for Python and PyTorch's dispatch. Medians of interleaved
repeats, backends taking turns; on a machine that others use, `--clock cpu` leaves out the time of
others. The last line is one JSON object.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

import twotower
from twotower.checkpoint import load_checkpoint
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.lab.bench.runners import open_engines
from twotower.model.rows import select_rows

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def median_ms(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Times of each call in milliseconds, taken in turns so that a slow spell hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 3):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat >= 3:  # warm-up
                times[name].append((clock() - start) * 1e3)
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


def passes(model: twotower.TwoTower, num_prompt: int) -> dict[str, Callable[[], object]]:
    """The passes of decoding one row after a prompt, by name."""
    size = model.config.block_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(4, model.config.vocab_size, (1, num_prompt), generator=generator)
    tokens = prompt[:, :1].expand(-1, size)
    block = torch.full((1, size), model.config.mask_token_id)
    base, row, t = model.prefill(prompt), torch.tensor([0]), torch.ones(1)

    def step() -> object:
        cache = select_rows(base, row)
        model.extend(cache, tokens[:, :1])
        return model.next_logits(cache)

    return {
        "ar_step": step,
        "extend": lambda: model.extend(select_rows(base, row), tokens),
        "read": lambda: model.context_head(model.verify(base, tokens).hidden),
        "denoise_pass": lambda: model.denoise(block, base.view(), t),
        "prefill": lambda: model.prefill(prompt),
        "copy_of_cache": lambda: select_rows(base, row),  # contained in the first two
    }


@torch.no_grad()
def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--model", default=twotower.__path__[0] + "/assets", help="checkpoint folder"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, help="tokens before the timed pass"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    parser.add_argument("--backend", default="eager,native", help="backends, separated by commas")
    parser.add_argument(
        "--quantization", default="none,int8", help="of those that have them, separated by commas"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall time, or processor time of this process",
    )
    parser.add_argument("--repeats", type=int, default=100, help="timed passes of each kind")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_checkpoint(args.model)
    calls: dict[str, Callable[[], object]] = {}
    engines, unable = open_engines(model, args.backend.split(","), args.quantization.split(","))
    for line in unable:
        print(f"not measured: {line}")
    for engine, own in engines.items():
        ready = passes(own, args.prompt_tokens)
        calls |= {f"{engine} {name}": call for name, call in ready.items()}
    result = {
        "recorded": recorded(),
        "ms": median_ms(calls, args.repeats, CLOCKS[args.clock]),
        "clock": args.clock,
        "block_size": model.config.block_size,
        "threads": args.threads,
        "model": args.model,
        "torch": torch.__version__,
    }
    for name, times in result["ms"].items():
        print(f"{name:22s} {times['median']:8.3f} ms  ({times['min']:.3f} to {times['max']:.3f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
