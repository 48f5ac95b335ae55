"""How much memory does loading take at its peak, compared with the checkpoint's size?

Limit: the weights themselves in the wanted dtype, or as native passes pack them. A checkpoint of
random weights is written, then loaded by a fresh process, whose growth in peak resident memory is
measured (Linux: VmHWM). The last line is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from twotower.checkpoint import save_two_towers
from twotower.cli.scripts import script_parser
from twotower.families import config_from_dict
from twotower.model import TwoTower
from twotower.model.initialise import randomise

CHILD = """
import sys, time, torch, twotower
from twotower import checkpoint
path, kind, towers = sys.argv[1:]
def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before, began = peak(), time.process_time()
if kind in ("int8", "int4"):
    model = twotower.load_model(path, quantization=kind)
else:
    dtype = {"keep": None, "float32": torch.float32}[kind]
    model = checkpoint.load_checkpoint(path, dtype=dtype, towers=towers)
bits = {"int8": 8, "int4": 5}.get(kind)
size = sum(
    p.numel() * bits // 8 if p.is_meta else p.numel() * p.element_size()
    for p in model.parameters()
)
print(peak() - before, size, time.process_time() - began)
"""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--hidden-size", type=int, default=1024, help="width of the random model")
    parser.add_argument("--shard-mb", type=int, default=64, help="size of a weight file, in MB")
    args = parser.parse_args()
    config = config_from_dict(
        {
            "hybrid_override_pattern": "M-*-" * 3,
            "hidden_size": args.hidden_size,
            "vocab_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "mamba_num_heads": 32,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "n_groups": 1,
            "conv_kernel": 4,
            "intermediate_size": 4 * args.hidden_size,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model = TwoTower(config)
        randomise(model, seed=0)
        save_two_towers(model, path, dtype=torch.bfloat16, max_shard_bytes=args.shard_mb * 2**20)
        del model
        file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        rows = [
            measure(path, dtype, towers)
            for dtype in ("keep", "float32", "int8", "int4")
            for towers in ("both", "context")
            if towers == "both" or dtype in ("keep", "float32")
        ]
    print(f"checkpoint: {file_bytes / 1e6:.0f} MB in bfloat16, shards of {args.shard_mb} MiB")
    for row in rows:
        print(
            f"dtype={row['dtype']:8s} towers={row['towers']:8s} "
            f"model {row['model_bytes'] / 1e6:6.0f} MB, peak +{row['peak_bytes'] / 1e6:6.0f} MB, "
            f"{row['processor_s']:.1f} s"
        )
    print(json.dumps({"checkpoint_bytes": file_bytes, "shard_mb": args.shard_mb, "loads": rows}))


def measure(path: Path, dtype: str, towers: str) -> dict[str, object]:
    """One load in a fresh process."""
    command = [sys.executable, "-c", CHILD, str(path), dtype, towers]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, size, seconds = output.split()
    return {
        "dtype": dtype, "towers": towers, "model_bytes": int(size), "peak_bytes": int(peak),
        "processor_s": float(seconds),
    }  # fmt: skip


if __name__ == "__main__":
    main()
