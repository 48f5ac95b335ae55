"""Two optimisers behind one: which parameters each moves, and how their state is kept."""

import pytest
import torch
from torch import Tensor

from twotower.model.initialise import copy_context_to_denoiser, randomise
from twotower.model.two_tower import TwoTower
from twotower.train.optimizer import Optimizers, is_turned, make_optimizer
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config


def model_of(preset: str = "moe") -> TwoTower:
    model = TwoTower(preset_config(preset, 270))
    randomise(model, 1)
    copy_context_to_denoiser(model, 2)
    return model


def optimizer_of(model: TwoTower, name: str) -> Optimizers:
    values = {"recipe": "denoiser", "init": "x", "optimizer": name, "learning_rate": 0.01}
    return make_optimizer(model, TrainOptions(**values))  # type: ignore[arg-type]


def held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_muon_turns_the_matrices_of_the_layers() -> None:
    """Silent failure: embeddings, heads, routers or stacked experts are orthogonalised."""
    names = {n for n, p in model_of().named_parameters() if is_turned(n, p)}
    kinds = {
        "0": ["in_proj", "out_proj"],
        "1": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "2": ["shared_experts.up_proj", "shared_experts.down_proj"],
    }
    assert names == {
        f"{tower}.layers.{int(layer) + later}.mixer.{matrix}.weight"
        for tower in ("context_tower", "denoiser_tower")
        for later in (0, 3)  # the pattern M*EM*E
        for layer, matrices in kinds.items()
        for matrix in matrices
    }
    mlp = {n for n, p in model_of("tiny").named_parameters() if is_turned(n, p)}
    assert {"context_tower.layers.2.mixer.up_proj.weight"} < mlp


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_trainable_parameter_is_held_once(name: str) -> None:
    model = model_of()
    model.context_tower.requires_grad_(False)
    model.tie_heads()
    optimizer = optimizer_of(model, name)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    parts = [held(part) for part in optimizer.parts]
    assert [type(part).__name__ for part in optimizer.parts] == ["AdamW", "Muon"][: len(parts)]
    assert len(parts) == (2 if name == "muon" else 1)
    assert set.union(*parts) == trainable and sum(map(len, parts)) == len(trainable)


def give_gradients(model: TwoTower, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: TwoTower) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_one_rate_and_one_size_of_step_for_both() -> None:
    """Silent failure: the schedule reaches one optimiser only, or Muon's steps are of another
    size, so that a rate found with AdamW ruins its matrices.
    """
    model = model_of("tiny")
    optimizer = optimizer_of(model, "muon")
    optimizer.set_learning_rate(0.002)
    before = weights(model)
    give_gradients(model, 0)
    optimizer.step()
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        size = float((parameter.detach() - old).square().mean().sqrt())
        # AdamW's first step has the size of the rate; Muon's is matched to 0.2 of it
        expected = 0.2 * 0.002 if is_turned(name, parameter) else 0.002
        assert size == pytest.approx(expected, rel=0.25), name
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
