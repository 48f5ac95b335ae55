"""What does a product with a quantised matrix cost on this CPU, by the ways that there are?

Limit: the bytes of the matrix over the memory bandwidth for few tokens, arithmetic for many. The
matrices are one of an expert of the released model and one like the shipped model's; a time is that
of the processor in the fastest of many repeats, one thread. The last line is one JSON object.
"""

import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.checkpoint.quantize import quantise
from twotower.cli.scripts import script_parser
from twotower.kernels.quantised import linear

SHAPES = {"expert 1,856 x 2,688": (1856, 2688), "projection 832 x 192": (832, 192)}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="seconds of repeats for each figure"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 16):
                times = {
                    way: round(1e6 * fastest(run, args.seconds), 1)
                    for way, run in ways(shape, tokens, dtype).items()
                }
                kind = str(dtype).removeprefix("torch.")
                records.append({"matrix": name, "dtype": kind, "tokens": tokens, "us": times})
                print(name, kind, tokens, times, flush=True)
    print(json.dumps({"threads": 1, "torch": torch.__version__, "products": records}))


def ways(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Products of `tokens` tokens with one matrix, by what computes them."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) * 0.02
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    full, eight, four = matrix.to(dtype), quantise(matrix, 8, None), quantise(matrix, 4, 32)
    numbers = torch.randint(0, 16, shape, generator=generator, dtype=torch.int32)
    kernel_form = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    both = torch.rand(shape[1] // 32, shape[0], 2, generator=generator).to(dtype)
    ones = torch.ones(shape[0], dtype=dtype)
    return {
        "full": lambda: F.linear(x, full),
        "int8, ours": lambda: linear(x, eight),
        "int8, torch's kernel": lambda: torch.ops.aten._weight_int8pack_mm(x, eight.qdata, ones),
        "int8 x int8, ours": lambda: linear(x, eight._replace(rounds_input=True)),
        "int4, ours": lambda: linear(x, four),
        "int4, torch's kernel": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, kernel_form, 32, both
        ),
    }


def fastest(run: Callable[[], Tensor], seconds: float) -> float:
    """Processor seconds of the fastest of at least three runs after a warm-up: other programs on
    the machine spoil the caches, but do not count.
    """
    run()
    end, best, count = time.process_time() + seconds, float("inf"), 0
    while count < 3 or time.process_time() < end:
        start = time.process_time()
        run()
        best, count = min(best, time.process_time() - start), count + 1
    return best


if __name__ == "__main__":
    main()
