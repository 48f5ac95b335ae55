"""`torchrun -m twotower train`: as good as one process, killed, resumed on another number, refused.

Two processes and few steps, because starting PyTorch is most of the time;
benchmarks/parallel_training.py has the full tables, of 4 processes too.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_qwen3_moe import SIZES as QWEN3_MOE
from tiny_training import make_shard, tiny_options
from twotower.checkpoint import load_checkpoint, save_backbone
from twotower.checkpoint.denoiser import load_denoiser
from twotower.families import config_from_dict, config_to_dict
from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower
from twotower.train.loop import train_steps
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config
from twotower.train.run_folder import RunFolder, read_metrics

SOURCE = Path(__file__).parents[2] / "src"
EXPERTS: dict[str, object] = {
    "hybrid_override_pattern": "M*E",
    "n_routed_experts": 3,  # not a multiple of the processes
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("data") / "shard")


def random_backbone(config: dict[str, object], folder: Path) -> Path:
    model = TwoTower(config_from_dict(config), "context")
    randomise(model, seed=0)
    save_backbone(model, folder)
    return folder


def vocabulary(data: Path) -> int:
    found: int = json.loads((data / "meta.json").read_text())["vocab_size"]
    return found


@pytest.fixture(scope="module")
def backbone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one with experts."""
    config = config_to_dict(preset_config("tiny", vocabulary(data))) | EXPERTS
    return random_backbone(config, tmp_path_factory.mktemp("model") / "backbone")


def start(options: TrainOptions, count: int, *more: str) -> subprocess.Popen[str]:
    """The command of a user, with the options in a TOML file."""
    lines = []
    for name, value in options.to_dict().items():
        if isinstance(value, tuple):
            value = list(value)
        if value is not None:
            lines.append(f"{name} = {json.dumps(value)}")
    file = Path(str(options.output) + ".toml")
    file.write_text("\n".join(lines))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "twotower", "train", "--options", str(file), *more],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids by rank."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, listed.split()))


def wait_for_step(process: subprocess.Popen[str], options: TrainOptions, step: int) -> None:
    while process.poll() is None:
        lines = read_metrics(RunFolder(options.run_folder).metrics)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def run_here(options: TrainOptions) -> None:
    for _ in train_steps(options):
        pass


def measured(options: TrainOptions) -> dict[tuple[float, str], float]:
    """Losses, and gradient norms: Adam and Muon would hide gradients of another scale."""
    return {
        (line["step"], name): line[name]
        for line in read_metrics(RunFolder(options.run_folder).metrics)
        for name in ("loss", "validation_loss", "grad_norm")
        if name in line
    }


def assert_same(
    one: TrainOptions, other: TrainOptions, loss: float, weights: float, norm: float | None = None
) -> None:
    """What was measured and the exported weights, within these differences; norm: of gradients."""
    expected, found = measured(one), measured(other)
    assert found.keys() == expected.keys() and len(found) >= one.steps
    for key, value in expected.items():
        most = norm if norm is not None and key[1] == "grad_norm" else loss
        assert abs(found[key] - value) / max(1.0, value) < most, key
    kind = "context" if one.recipe == "backbone" else "both"
    first, second = (
        load_checkpoint(RunFolder(options.run_folder).export, towers=kind).state_dict()
        for options in (one, other)
    )
    assert max((first[name] - second[name]).abs().max().item() for name in first) < weights


@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")
def test_a_killed_process_ends_the_others_and_one_process_goes_on(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: processes that train on the same rows or divide by their own tokens; experts
    or routers that one process does not update; a checkpoint that only two processes can read.
    """
    changes: dict[str, object] = {"preset": None, "init": str(backbone), "steps": 12}
    whole = tiny_options(data, tmp_path / "whole", **changes)
    broken = tiny_options(data, tmp_path / "broken", **changes, checkpoint_every=2)
    process = start(broken, 2, "--peer-timeout-s", "20")
    wait_for_step(process, broken, 5)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: process 0: another process of the run was lost (")
    newest = RunFolder(broken.run_folder).newest()
    assert newest is not None and len([*newest.glob("*.safetensors")]) == 2

    run_here(broken)
    run_here(whole)
    assert_same(whole, broken, loss=1e-5, weights=1e-5)  # float32 sums in another order


def test_two_processes_go_on_from_one_to_the_same_model(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: optimiser state under the wrong name or of the wrong rows, an average that
    starts anew, a frozen tower that is not handed out, noise that depends on the process.
    """
    changes: dict[str, object] = {
        "recipe": "denoiser",
        "preset": None,
        "init": str(backbone),
        "targets": "completion",
        "accumulate": 2,
        "ema_decay": 0.5,
        "optimizer": "muon",
        "activation_checkpointing": True,
        "steps": 6,
        "eval_every": 2,
        "eval_rows": 3,  # an odd number for two processes
    }
    whole = tiny_options(data, tmp_path / "whole", **changes)
    handed = tiny_options(data, tmp_path / "handed", **changes)
    steps = train_steps(handed)
    for _ in range(3):
        next(steps)
    steps.close()
    process = start(handed, 2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("\n") == 1 and "6 steps done; the model is in" in out
    assert err.count("step 4/6") == 1  # one process reports
    run_here(whole)
    # Muon rounds to bfloat16 inside, some processors by instructions of their own; losses tell.
    assert_same(whole, handed, loss=1e-4, weights=2e-3, norm=1e-3)


def test_two_processes_train_a_thin_denoiser_as_one_does(data: Path, tmp_path: Path) -> None:
    """Silent failure: native passes of a process that has some rows of the weights, or a backbone
    that has been handed out to one alone.
    """
    backbone = tiny_options(data, tmp_path / "backbone", steps=2)
    run_here(backbone)
    changes: dict[str, object] = {
        "recipe": "denoiser",
        "preset": None,
        "init": str(RunFolder(backbone.run_folder).export),
        "reads": (0, 2),
        "eval_every": 2,
        "eval_rows": 3,
    }
    eager = tiny_options(data, tmp_path / "eager", **changes, backend="eager")
    whole, two = (tiny_options(data, tmp_path / name, **changes) for name in ("whole", "two"))
    process = start(two, 2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run_here(whole)
    run_here(eager)
    for one, other, most in ((whole, two, 1e-5), (whole, eager, 1e-4)):
        expected, found = measured(one), measured(other)
        assert found.keys() == expected.keys() and len(found) > whole.steps
        assert all(
            abs(found[key] - value) / max(1.0, value) < most for key, value in expected.items()
        )


@pytest.mark.parametrize("reads", [None, (0, 1, 4)], ids=["full", "thin"])
def test_two_processes_train_a_denoiser_with_gated_experts_as_one_does(
    data: Path, tmp_path: Path, reads: tuple[int, ...] | None
) -> None:
    """Silent failure: gates that one process does not gather, or whose gradients are not added up;
    a thin denoiser whose experts are not trained.
    """
    config = QWEN3_MOE | {"vocab_size": vocabulary(data), "eos_token_id": 1}
    backbone = random_backbone(config, tmp_path / "backbone")
    changes: dict[str, object] = {
        "recipe": "denoiser", "preset": None, "init": str(backbone), "steps": 4, "reads": reads,
        "weight_decay": 0.0,
    }  # fmt: skip
    whole, two = (tiny_options(data, tmp_path / name, **changes) for name in ("whole", "two"))
    process = start(two, 2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run_here(whole)
    expected, found = measured(whole), measured(two)
    assert found.keys() == expected.keys() and len(found) >= whole.steps
    assert all(abs(found[key] - value) < 1e-4 for key, value in expected.items())
    before = load_checkpoint(backbone, towers="context")
    exports = [RunFolder(options.run_folder).export for options in (whole, two)]
    first, second = (
        load_checkpoint(export) if reads is None else load_denoiser(before, export)
        for export in exports
    )
    source = before.state_dict()["context_tower.layers.1.mixer.experts.gate_proj"]
    for name, value in first.denoiser().state_dict().items():
        assert (second.denoiser().state_dict()[name] - value).abs().max() < 1e-4, name
        if name == "layers.1.mixer.experts.gate_proj":
            # Without decay, AdamW moves what has had a gradient.
            assert ((value - source).flatten(1).abs().amax(1) > 0).sum() >= 7


def test_an_error_of_the_user_is_told_once(data: Path, tmp_path: Path) -> None:
    process = start(tiny_options(data, tmp_path / "run", batch_size=3), 2)
    out, err = process.communicate(timeout=300)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: --batch-size: 3 rows cannot be split evenly over 2 processes; use a multiple of 2"
    ]
    assert out == "" and process.returncode == 1  # torchrun's own
    assert not (tmp_path / "run").exists()
