"""A mixture-of-experts model all the way: trained, saved, inspected, loaded, decoded."""

from pathlib import Path

import pytest
import torch

from tiny_denoiser import denoiser, exported, run
from tiny_training import make_shard, tiny_options
from twotower import GenerateOptions, generate
from twotower.checkpoint import describe, load_checkpoint, save_two_towers
from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower
from twotower.tokenizer import load_tokenizer
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config

STEPS: dict[str, object] = {
    "steps": 24, "learning_rate": 0.01, "batch_size": 8, "weight_decay": 0.0
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], TrainOptions]:
    """The losses of both runs, one after the other, and the denoiser's options."""
    folder = tmp_path_factory.mktemp("moe")
    data = make_shard(folder / "shard")
    first = tiny_options(data, folder / "backbone", preset="moe", **STEPS)
    losses = [report.loss for report in run(first)]
    options = denoiser(data, folder / "backbone" / "export", folder / "denoiser", **STEPS)
    return losses + [report.loss for report in run(options)], options


def test_both_recipes_learn(trained: tuple[list[float], TrainOptions]) -> None:
    losses, _ = trained
    backbone, denoising = losses[:24], losses[24:]
    assert sum(backbone[-4:]) < 0.6 * sum(backbone[:4])
    assert sum(denoising[-4:]) < 0.9 * sum(denoising[:4])


def test_gradients_reach_routers_and_every_expert(
    trained: tuple[list[float], TrainOptions],
) -> None:
    """Silent failure: a router without gradient, or experts that no token ever reached.

    Without weight decay, AdamW moves exactly what has had a gradient.
    """
    _, options = trained
    assert options.init is not None
    before, after = load_checkpoint(options.init).state_dict(), exported(options).state_dict()
    for layer in (2, 5):
        for part in ("gate.weight", "experts.up_proj", "experts.down_proj"):
            name = f"layers.{layer}.mixer.{part}"
            moved = after[f"denoiser_tower.{name}"] - before[f"denoiser_tower.{name}"]
            # 24 steps may miss some of 8 experts: the last bits of a processor decide which.
            assert (moved.flatten(1).abs().amax(1) > 0).sum() >= 6, name
            assert torch.equal(after[f"context_tower.{name}"], before[f"context_tower.{name}"])
        bias = f"layers.{layer}.mixer.gate.e_score_correction_bias"
        assert before[f"context_tower.{bias}"].abs().max() > 0  # moved with the backbone
        assert torch.equal(after[f"context_tower.{bias}"], before[f"context_tower.{bias}"])
        assert not torch.equal(after[f"denoiser_tower.{bias}"], before[f"denoiser_tower.{bias}"])


def test_the_file_is_loaded_and_decoded(trained: tuple[list[float], TrainOptions]) -> None:
    """Silent failure: experts are exchanged between training and file, and still decode."""
    _, options = trained
    folder = options.run_folder / "export"
    model, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    for mode in ("ar", "diffusion"):
        chosen = GenerateOptions(mode=mode, max_new_tokens=16, ignore_eos=True)
        (row,) = generate(model, ["Say 7: "], chosen, tokenizer)
        assert len(row.tokens) == 16
        if mode == "ar":
            assert row.text.count("it is") >= 1, row.text
    record = describe(folder)
    assert record.layers == {"Mamba-2": 2, "attention": 2, "mixture of experts": 2}
    assert record.files is not None and record.files.problem is None
    tower = record.towers["denoiser"]
    routed = 2 * 8 * 2 * 128 * 128  # layers, experts, matrices
    assert tower.parameters["moe routed"] == routed
    assert tower.total - tower.active == routed * 6 // 8


def test_the_packaged_size_is_below_6_mb(tmp_path: Path) -> None:
    model = TwoTower(preset_config("moe", 1024))
    save_two_towers(model, tmp_path / "model", dtype=torch.bfloat16)
    assert sum(f.stat().st_size for f in (tmp_path / "model").iterdir()) < 6_000_000


def test_stacked_experts_start_as_small_as_other_residual_matrices() -> None:
    """Silent failure: the rescaling of what enters the residual stream passes the experts by."""
    model = TwoTower(preset_config("moe", 300), "context")
    randomise(model, 0)
    deviation = {n: p.std().item() for n, p in model.context_tower.named_parameters()}
    for matrix, std in (("up_proj", 0.02), ("down_proj", 0.02 / 6**0.5)):
        for part in ("experts." + matrix, f"shared_experts.{matrix}.weight"):
            assert deviation[f"layers.2.mixer.{part}"] == pytest.approx(std, rel=0.05)
