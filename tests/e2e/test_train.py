"""Training from the command line: kills, stops, resuming, and one recipe feeding the next."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tiny_training import make_shard, tiny_options
from twotower.checkpoint import load_checkpoint
from twotower.tokenizer import load_tokenizer
from twotower.train.loop import train_steps
from twotower.train.options import TrainOptions
from twotower.train.run_folder import RunFolder, read_metrics

SOURCE = Path(__file__).parents[2] / "src"
STEPS = 90


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("data") / "shard")


def command_line(options: TrainOptions) -> list[str]:
    """The flags that mean `options`."""
    default = TrainOptions(recipe=options.recipe, init=options.init)
    arguments = ["--recipe", options.recipe]
    for name, value in options.to_dict().items():
        flag = name.replace("_", "-")
        if name == "recipe" or value == default.to_dict()[name]:
            continue
        arguments += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return arguments


def start(options: TrainOptions) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "twotower", "train", *command_line(options)],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], options: TrainOptions, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(RunFolder(options.run_folder).metrics)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def run_here(options: TrainOptions) -> None:
    for _ in train_steps(options):
        pass


def losses(options: TrainOptions) -> list[tuple[float, float]]:
    lines = read_metrics(RunFolder(options.run_folder).metrics)
    return [(line["step"], line["loss"]) for line in lines]


def test_a_killed_and_a_stopped_run_equal_an_unbroken_one(data: Path, tmp_path: Path) -> None:
    """Silent failure: after `kill -9`, resuming changes the training, or doubles metric lines.

    A checkpoint at every step makes it likely that the kill falls into the writing of one.
    """
    changes: dict[str, object] = {"steps": STEPS, "checkpoint_every": 1, "dtype": "bfloat16"}
    whole = tiny_options(data, tmp_path / "whole", **changes | {"checkpoint_every": 500})
    broken = tiny_options(data, tmp_path / "broken", **changes)

    process = start(broken)
    wait_for_step(process, broken, 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(broken)
    wait_for_step(process, broken, 30)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"of {STEPS}; run it again to resume" in out
    assert not RunFolder(broken.run_folder).export.exists()

    run_here(broken)
    run_here(whole)
    assert [step for step, _ in losses(broken)] == list(range(1, STEPS + 1))
    assert losses(broken) == losses(whole)
    one, two = (
        load_checkpoint(RunFolder(o.run_folder).export, towers="context") for o in (whole, broken)
    )
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(one.context_logits(ids), two.context_logits(ids))


def test_a_backbone_becomes_a_denoiser(data: Path, tmp_path: Path) -> None:
    """Silent failure: the denoiser trains on another context tower than the backbone's."""
    backbone = tiny_options(data, tmp_path / "backbone", steps=4)
    run_here(backbone)
    source = RunFolder(backbone.run_folder).export
    changes = {"recipe": "denoiser", "init": str(source), "preset": None, "steps": 60}
    denoiser = tiny_options(data, tmp_path / "denoiser", **changes, learning_rate=0.02)
    run_here(denoiser)
    values = [loss for _, loss in losses(denoiser)]
    assert sum(values[-10:]) < 0.6 * sum(values[:10])

    before = load_checkpoint(source, towers="context")
    model = load_checkpoint(RunFolder(denoiser.run_folder).export)
    ids = torch.tensor([[1, 5, 9, 12]])
    assert torch.equal(model.context_logits(ids), before.context_logits(ids))
    tokenizer = load_tokenizer(RunFolder(denoiser.run_folder).export)
    assert tokenizer.fingerprint == load_tokenizer(data).fingerprint

    prompt = torch.tensor([tokenizer.encode("Say 7: ", add_bos=True)])
    block = torch.full((1, model.config.block_size), model.config.mask_token_id)
    logits = model.denoise(block, model.prefill(prompt).view(), torch.ones(1))
    assert logits.shape == (1, 16, tokenizer.vocab_size) and logits.isfinite().all()


def test_a_backbone_of_another_vocabulary_is_refused(data: Path, tmp_path: Path) -> None:
    run_here(tiny_options(data, tmp_path / "backbone", steps=1))
    init = tmp_path / "backbone" / "export"
    other = make_shard(tmp_path / "other", count=30)
    changes = {"recipe": "denoiser", "init": str(init), "preset": None}
    (other / "meta.json").write_text(
        (other / "meta.json").read_text().replace('"vocab_size": 2', '"vocab_size": 3', 1)
    )
    with pytest.raises(ValueError, match=r"its vocabulary has 3.. tokens, the model's 2"):
        run_here(tiny_options(other, tmp_path / "denoiser", **changes))


def test_an_error_of_the_user_is_one_line_and_status_2(tmp_path: Path) -> None:
    process = start(tiny_options(tmp_path / "absent", tmp_path / "run"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1 and "is not a token shard" in err
