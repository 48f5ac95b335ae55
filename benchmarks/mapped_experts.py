"""Does a model whose experts exceed memory run with experts in mapped files, and how fast?

A checkpoint of random experts is generated, its pages are dropped from the page cache, and fresh
processes load it under a limit: a memory cgroup, which counts cached file pages too (one must have
the right to make one), and RLIMIT_DATA, which counts private memory only. Limit of speed: the disk,
from which dropped pages of experts are read again. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from twotower.checkpoint import save_two_towers
from twotower.checkpoint.empty import allocate, build_empty
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.families import config_from_dict
from twotower.model import TwoTower
from twotower.model.initialise import randomise

CONFIG = {
    "hybrid_override_pattern": "ME*EME",
    "hidden_size": 512,
    "vocab_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 1,
    "conv_kernel": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
    "eos_token_id": None,
    "block_size": 16,
}
CHILD = """
import json, os, resource, sys, time
how, value, path, experts, mode, tokens = sys.argv[1:]
if how == "cgroup":
    with open(os.path.join(value, "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))
import torch, twotower
from twotower import checkpoint
if how == "data":  # what the interpreter and its libraries hold already is not the model's
    held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + int(value),) * 2)
torch.set_num_threads(1)
def status(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name + ":"))
    return int(line.split()[1]) * 1024
def read_bytes():
    return int(next(l for l in open("/proc/self/io") if l.startswith("read_bytes")).split()[1])
start, before = time.perf_counter(), read_bytes()
try:
    model = checkpoint.load_checkpoint(path, dtype=None, expert_storage=experts)
except ValueError as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit(3)
loaded, anonymous = time.perf_counter(), status("RssAnon")
options = twotower.GenerateOptions(mode=mode, max_new_tokens=int(tokens))
found = twotower.generate(model, [list(range(10, 26))], options)
done = time.perf_counter()
print(json.dumps({
    "load_s": round(loaded - start, 2),
    "tokens_per_s": round(len(found[0].tokens) / (done - loaded), 2),
    "tokens": list(found[0].tokens)[:8],
    "peak_rss_mb": status("VmHWM") // 10**6,
    "private_mb": status("RssAnon") // 10**6,
    "read_from_disk_mb": (read_bytes() - before) // 10**6,
}))
"""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--experts", type=int, default=96, help="experts in each of the 3 layers")
    parser.add_argument("--limit-mb", type=int, default=600, help="memory limit, in MB")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder for the checkpoint, such as one on a slow disk; without it a temporary one",
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds given to each run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as parent:
        path = Path(parent) / "model"
        sizes = generate(path, args.experts)
        print(f"checkpoint: {sizes['file_mb']} MB, of which experts {sizes['experts_mb']} MB")
        runs = []
        group = make_cgroup(args.limit_mb * 10**6)
        limits = [("none", "0"), ("data", str(args.limit_mb * 10**6))]
        limits += [("cgroup", str(group))] if group else []
        try:
            for how, value in limits:
                for experts, mode in (("memory", "ar"), ("mmap", "ar"), ("mmap", "diffusion")):
                    forget(path)
                    run = run_child(how, value, path, (experts, mode), args)
                    runs.append({"limit": how, "experts": experts, "mode": mode, **run})
                    print(json.dumps(runs[-1]), flush=True)
        finally:
            if group:
                group.rmdir()
    print(json.dumps({"recorded": recorded(), "limit_mb": args.limit_mb, **sizes, "runs": runs}))


def generate(path: Path, num_experts: int) -> dict[str, int]:
    """Write a bfloat16 checkpoint; experts are shifted copies of random ones: only bytes matter."""
    config = config_from_dict({**CONFIG, "n_routed_experts": num_experts})
    small = TwoTower(config_from_dict({**CONFIG, "n_routed_experts": 4}))
    randomise(small, seed=0)
    model = build_empty(config, "both")
    cpu = torch.device("cpu")
    allocate(model, (torch.bfloat16, torch.bfloat16), (cpu, cpu))
    of_experts, source = 0, small.state_dict()
    for name, target in model.state_dict().items():
        if ".experts." in name:
            of_experts += target.numel() * 2
        if target.shape == source[name].shape:
            target.copy_(source[name])
            continue
        if target.dim() == 1:  # the router's correction
            target.zero_()
            continue
        for index, part in enumerate(target):  # experts, or the router's rows
            part.copy_(source[name][index % 4].roll(index // 4, -1))
    save_two_towers(model, path, max_shard_bytes=250_000_000)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"file_mb": size // 10**6, "experts_mb": of_experts // 10**6}


def forget(path: Path) -> None:
    """Drop the files' pages from the page cache, so that what is read comes from the disk."""
    for file in path.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_cgroup(limit: int) -> Path | None:
    """A memory cgroup below our own with a limit in bytes; None where none may be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "memory":
            parent, file = Path("/sys/fs/cgroup/memory") / own.lstrip("/"), "memory.limit_in_bytes"
        elif not controllers:
            parent, file = Path("/sys/fs/cgroup") / own.lstrip("/"), "memory.max"
        else:
            continue
        group = parent / f"twotower-mapped-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / file).exists():
            (group / file).write_text(str(limit))
            return group
        group.rmdir()
    print("no memory cgroup can be made here: RLIMIT_DATA alone", file=sys.stderr)
    return None


def run_child(
    how: str, value: str, path: Path, what: tuple[str, str], args: argparse.Namespace
) -> dict[str, object]:
    """One load and one text in a fresh process under a limit.

    A cgroup without swap may drop and read the program's own pages over and over before it kills:
    such a run is ended after the timeout.
    """
    command = [sys.executable, "-c", CHILD, how, value, str(path), *what, str(args.tokens)]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=args.timeout
        )
    except subprocess.TimeoutExpired:
        return {"not_finished_after_s": args.timeout}
    record: dict[str, object] = {"seconds": round(time.perf_counter() - start, 1)}
    lines = done.stdout.splitlines()
    if lines:
        return {**record, **json.loads(lines[-1])}
    if done.returncode < 0:
        return {**record, "killed_by_signal": -done.returncode}
    return {**record, "failed": done.stderr.strip().splitlines()[-1:]}


if __name__ == "__main__":
    main()
