"""Does training on several processes compute what one process computes, and survive what one does?

Three tables, by the command as a user gives it: losses of 2 and 4 processes (gloo, one machine)
against a single one's; runs that go on from another number of processes, after a stop or a SIGKILL,
against an unbroken one; seconds until the others end when one process is killed or hangs. No
speeds: processes that share a core only show that they can. The last line is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from twotower.checkpoint import load_checkpoint, save_backbone
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.families import config_from_dict
from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower
from twotower.train.loop import train_steps
from twotower.train.options import TrainOptions
from twotower.train.prepare import PrepareOptions, prepare
from twotower.train.processes import joined
from twotower.train.run_folder import RunFolder, read_metrics

WIDTHS: dict[str, object] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "conv_kernel": 4,
    "intermediate_size": 64,
    "n_routed_experts": 6,  # not a multiple of 4 processes
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
PATTERNS = {"dense": "M*-", "experts": "M*E"}
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "backbone, dense": ("backbone", "dense", {}),
    "backbone, experts": ("backbone", "experts", {}),
    "denoiser, dense": ("denoiser", "dense", {}),
    "denoiser, experts": ("denoiser", "experts", {}),
    "denoiser, experts, context trained, activations recomputed": (
        "denoiser",
        "experts",
        {"train_context": True, "ar_loss_weight": 0.5, "activation_checkpointing": True},
    ),
    "denoiser, dense, tied towers with next-token loss": (
        "denoiser",
        "dense",
        {"towers": "tied-ar"},
    ),
    "denoiser, dense, some blocks, completions, 1/t, both scan directions": (
        "denoiser",
        "dense",
        {
            "targets": "completion",
            "denoised_blocks_per_row": 3,
            "mask_rate_per": "block",
            "loss_weight": "elbo",
            "bidirectional_mamba": True,
        },
    ),
    "backbone, experts, 2 passes a step, average, validation": (
        "backbone",
        "experts",
        {"accumulate": 2, "ema_decay": 0.9, "eval_every": 10, "eval_rows": 6},
    ),
    "backbone, dense, Muon": ("backbone", "dense", {"optimizer": "muon"}),
    "denoiser, experts, Muon": ("denoiser", "experts", {"optimizer": "muon"}),
    "backbone, dense, bfloat16": ("backbone", "dense", {"dtype": "bfloat16"}),
    "denoiser, experts, bfloat16": ("denoiser", "experts", {"dtype": "bfloat16"}),
}
# Processes of each leg and the step after which it stops; how the leg ends.
RESUMES: dict[str, list[tuple[int, int, str]]] = {
    "1 -> 2": [(1, 10, "stop"), (2, 0, "end")],
    "2 -> 1": [(2, 10, "stop"), (1, 0, "end")],
    "2 -> 2, one process killed": [(2, 10, "kill"), (2, 0, "end")],
    "1 -> 2 -> 4 -> 1": [(1, 10, "stop"), (2, 20, "stop"), (4, 30, "stop"), (1, 0, "end")],
    "4 -> 2, one process killed": [(4, 10, "kill"), (2, 0, "end")],
}
STEPS = 50
CASES_ORDER = {name: place for place, name in enumerate(CASES)}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--cases", help="only cases whose name has this in it")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="parts to leave out: equality, resume, loss"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [name for name in CASES if not args.cases or args.cases in name]
    if args.worker:
        work(args.worker, names)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        found: dict[str, object] = {
            "recorded": recorded(),
            "torch": torch.__version__,
            "backend": "gloo",
            "steps": STEPS,
        }
        if "equality" not in args.skip:
            found["equality"] = equality(folder, names, args.cases)
        if "resume" not in args.skip:
            found["resume"] = [resume(folder, name) for name in RESUMES]
        if "loss" not in args.skip:
            found["lost_process"] = [lost(folder, kind) for kind in ("killed", "hanging")]
    print(json.dumps(found))


def make_inputs(folder: Path) -> None:
    """A shard and a backbone of each pattern."""
    source = folder / "documents.jsonl"
    with source.open("w") as stream:
        for n in range(400):
            pair = {"prompt": f"Say {n % 10}: ", "completion": f"it is {n % 10}.\n"}
            stream.write(json.dumps(pair) + "\n")
    options = PrepareOptions(
        output=folder / "data", input=(source,), vocab_size=270, tokens=100_000
    )
    for _ in prepare(options):
        pass
    vocab_size = json.loads((folder / "data" / "meta.json").read_text())["vocab_size"]
    for name, pattern in PATTERNS.items():
        values = {"hybrid_override_pattern": pattern, "vocab_size": vocab_size}
        config = config_from_dict(WIDTHS | values)
        model = TwoTower(config, "context")
        randomise(model, seed=0)
        save_backbone(model, folder / name)


def options_of(folder: Path, case: str, out: str) -> TrainOptions:
    recipe, pattern, changes = CASES[case]
    values: dict[str, object] = {
        "recipe": recipe,
        "data": str(folder / "data"),
        "output": str(folder / out),
        "init": str(folder / pattern),
        "sequence_length": 32,
        "batch_size": 4,
        "steps": STEPS,
        "warmup_steps": 2,
        "dtype": "float32",
        "log_every": 1,
        "eval_every": 0,
        "tensorboard": False,
    }
    return TrainOptions(**(values | changes))  # type: ignore[arg-type]


def work(folder: Path, cases: list[str]) -> None:
    """All cases in one set of processes, to start PyTorch once."""
    with joined("cpu", 600) as processes:
        for case in cases:
            options = options_of(folder, case, f"{processes.count}/{CASES_ORDER[case]}")
            for _ in train_steps(options, processes):
                pass
            if processes.count == 1:
                for _ in train_steps(two_passes(options, folder / f"control/{CASES_ORDER[case]}")):
                    pass


def two_passes(options: TrainOptions, out: Path) -> TrainOptions:
    """The same rows of each step in twice as many passes: what the order of sums alone changes."""
    accumulate = 2 * options.accumulate
    half = options.batch_size // 2
    return dataclasses.replace(options, output=out, batch_size=half, accumulate=accumulate)


def equality(folder: Path, cases: list[str], only: str | None) -> list[dict[str, object]]:
    arguments = [str(Path(__file__)), "--worker", str(folder)]
    arguments += ["--cases", only] if only else []
    for count in (1, 2, 4):
        subprocess.run([*launcher(count), *arguments], check=True, env=environment())
    rows = []
    for case in cases:
        row: dict[str, object] = {"case": case}
        for count in (2, 4):
            one, many = (folder / f"{n}/{CASES_ORDER[case]}" for n in (1, count))
            row[f"processes_{count}"] = compare(one, many)
        control = folder / f"control/{CASES_ORDER[case]}"
        if control.exists():
            row["one_process_in_two_passes"] = compare(one, control)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def compare(one: Path, many: Path) -> dict[str, float]:
    """Largest differences of losses and of exported weights."""
    first, second = (losses(folder) for folder in (one, many))
    assert first.keys() == second.keys() and len(first) >= STEPS
    models = [load_checkpoint(folder / "export", towers=towers(folder)) for folder in (one, many)]
    weights = [model.state_dict() for model in models]
    return {
        "loss": max(abs(first[key] - second[key]) for key in first),
        "weights": max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0]),
    }


def towers(folder: Path) -> str:
    return (
        "context"
        if json.loads((folder / "options.json").read_text())["recipe"] == "backbone"
        else "both"
    )


def losses(folder: Path) -> dict[tuple[float, str], float]:
    return {
        (line["step"], name): line[name]
        for line in read_metrics(RunFolder(folder).metrics)
        for name in ("loss", "validation_loss")
        if name in line
    }


def resume(folder: Path, name: str) -> dict[str, object]:
    """Legs of one run on other numbers of processes, against the unbroken run of one process."""
    case = "denoiser, experts"
    whole = options_of(folder, case, "whole")
    if not RunFolder(whole.run_folder).export.exists():
        run(whole, 1)
    legs = options_of(folder, case, f"resume-{list(RESUMES).index(name)}")
    for count, step, ending in RESUMES[name]:
        if ending == "end":
            run(legs, count)
        else:
            break_off(legs, count, step, ending)
    found = {"legs": name, **compare(whole.run_folder, legs.run_folder)}
    print(json.dumps(found), flush=True)
    return found


def break_off(options: TrainOptions, count: int, step: int, ending: str) -> None:
    """Stop a run after a step as its user would, or kill one of its processes."""
    with started(options, count, "--checkpoint-every", "5") as process:
        wait_for_step(process, options, step)
        if ending == "stop":
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(workers(process)[-1], signal.SIGKILL)
        process.communicate(timeout=300)
    assert not RunFolder(options.run_folder).export.exists()


def lost(folder: Path, kind: str) -> dict[str, object]:
    """Two processes, one of which is killed or stops answering: what the other does and when."""
    options = options_of(folder, "denoiser, dense", f"lost-{kind}")
    timeout_s = 10
    with started(options, 2, "--peer-timeout-s", str(timeout_s)) as process:
        wait_for_step(process, options, 5)
        begin = time.monotonic()
        victim, survivor = workers(process)[-1], workers(process)[0]
        os.kill(victim, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        while is_running(survivor):
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        if kind == "hanging":
            os.kill(victim, signal.SIGKILL)  # torchrun would after 30 seconds
        _, err = process.communicate(timeout=300)
    (line,) = [line for line in err.splitlines() if line.startswith("error: process 0")]
    line = line.replace(str(folder), "")
    found = {"process": kind, "timeout_s": timeout_s, "ended_after_s": round(seconds, 1)}
    found |= {"status": process.returncode, "line": line}
    print(json.dumps(found), flush=True)
    return found


def run(options: TrainOptions, count: int) -> None:
    with started(options, count) as process:
        out, err = process.communicate(timeout=1200)
    if process.returncode or not RunFolder(options.run_folder).export.exists():
        raise SystemExit(f"{count} processes: {out}{err}")


@contextlib.contextmanager
def started(options: TrainOptions, count: int, *changes: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*launcher(count), "-m", "twotower", "train", *flags(options), *changes],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()


def launcher(count: int) -> list[str]:
    if count == 1:
        return [sys.executable]
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--standalone", "--nproc-per-node", str(count)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def flags(options: TrainOptions) -> list[str]:
    default = TrainOptions(recipe=options.recipe, init=options.init).to_dict()
    arguments = [options.recipe, "--init", str(options.init)]
    for name, value in options.to_dict().items():
        if name in ("recipe", "init") or value == default[name]:
            continue
        flag = name.replace("_", "-")
        arguments += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return arguments


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of torchrun's processes, by rank: they are started in this order."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, listed))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_step(process: subprocess.Popen[str], options: TrainOptions, step: int) -> None:
    while process.poll() is None:
        lines = read_metrics(RunFolder(options.run_folder).metrics)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise SystemExit(f"step {step} was not reached: {process.communicate()}")


if __name__ == "__main__":
    main()
