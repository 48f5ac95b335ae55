"""How much memory does decoding take at its peak, against weights and cache?

Limit: the weights in memory, and keys, values and Mamba states of all tokens. Each case, a mode and
a prompt length, is a process of its own, whose growth in peak resident memory (Linux: VmHWM) over
the loaded and warmed-up model is measured. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys

from twotower.checkpoint.files import shipped_folder
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser

MODES = ("ar", "diffusion", "speculative", "posterior", "predict-and-noise", "mock-ar")
LENGTHS = (256, 1024, 4096, 16384)

CHILD = """
import json, sys, torch, twotower
from twotower.backends import accelerate

path, mode, length, new, backend = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]

def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
plain = load_checkpoint(path)
model = accelerate(plain, backend)
options = twotower.GenerateOptions(
    mode=mode, max_new_tokens=new, ignore_eos=True, seed=0, temperature=0.0
)
generator = torch.Generator().manual_seed(0)
prompt = torch.randint(4, model.config.vocab_size, (length,), generator=generator).tolist()
twotower.generate(model, [prompt[:16]], options)
before = peak()
twotower.generate(model, [prompt], options)
tower, size = model.config.context, next(plain.parameters()).element_size()
print(json.dumps({
    "weights_bytes": sum(p.numel() * p.element_size() for p in plain.parameters()),
    "kv_bytes": (length + new) * tower.kv_elements * size,
    "state_bytes": tower.conv_elements * size + tower.ssm_elements * 4,
    "growth_bytes": peak() - before,
    "resident_before_bytes": before,
}))
"""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="shipped", help="checkpoint folder, or shipped")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of the prompts"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="decoding modes"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=32, help="tokens decoded after each prompt"
    )
    parser.add_argument(
        "--backend", choices=("eager", "native"), default="eager", help="what runs forward passes"
    )
    args = parser.parse_args()
    rows = []
    for mode in args.modes:
        for length in args.lengths:
            row = measure(args, mode, length)
            rows.append({"mode": mode, "prompt_tokens": length, **row})
            cache = row["kv_bytes"] + row["state_bytes"]
            print(
                f"{mode:17s} {length:6d} tokens: weights {row['weights_bytes'] / 1e6:6.1f} MB, "
                f"cache {cache / 1e6:6.1f} MB, peak +{row['growth_bytes'] / 1e6:6.1f} MB "
                f"({row['growth_bytes'] / cache:.2f} times the cache)"
            )
    print(json.dumps({"recorded": recorded(), "cases": rows, "settings": vars(args)}))


def measure(args: argparse.Namespace, mode: str, length: int) -> dict[str, int]:
    """One case in a fresh process."""
    path = str(shipped_folder()) if args.model == "shipped" else args.model
    given = [path, mode, str(length), str(args.new_tokens), args.backend]
    command = [sys.executable, "-c", CHILD, *given]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = json.loads(output)
    return found


if __name__ == "__main__":
    main()
