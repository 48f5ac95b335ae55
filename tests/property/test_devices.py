"""Models on a device that is no CPU; see `far_device`, which refuses what CUDA refuses."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_adapt
from far_device import far_device
from tiny_denoiser import denoiser, make_backbone
from tiny_models import fresh_model, prompts_of
from tiny_training import make_shard
from twotower import (
    EngineOptions,
    GenerateOptions,
    TwoTower,
    generate,
    score_texts,
)
from twotower.adapt.features import find_places, write_part
from twotower.adapt.options import StepOptions
from twotower.adapt.training import Trainer, measure
from twotower.backends import accelerate
from twotower.checkpoint import load_checkpoint, save_backbone, save_two_towers
from twotower.checkpoint.denoiser import load_denoiser, save_denoiser
from twotower.graphs.backend import GraphsBackend
from twotower.train.loop import train_steps

PROMPTS = prompts_of([3, 9, 5, 1, 12])
MODES: list[dict[str, object]] = [
    {"mode": "ar"},
    {"mode": "ar", "temperature": 1.0, "top_k": 5, "min_p": 0.01, "seed": 3},
    {"mode": "ar", "repetition_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": {5: 2.0}},
    {"mode": "speculative", "logprobs": 3},
    {"mode": "speculative", "drafts": "denoiser"},
    {"mode": "speculative", "drafts": "lookup"},
    {"mode": "speculative", "temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"mode": "diffusion"},
    {"mode": "diffusion", "temperature": 1.0, "top_p": 0.9, "seed": 3},
    {"mode": "predict-and-noise", "remask": "random", "seed": 1},
]


def texts(
    model: TwoTower, mode: dict[str, object], engine: EngineOptions | None = None
) -> list[list[int]]:
    options = GenerateOptions(max_new_tokens=14, **mode)  # type: ignore[arg-type]
    return [found.tokens for found in generate(model, PROMPTS, options, engine=engine)]


def full() -> TwoTower:
    return fresh_model()


def thin() -> TwoTower:
    return tiny_adapt.thin(tiny_adapt.backbone())


def test_the_device_refuses_what_cuda_refuses() -> None:
    """Guards the tests below: a device that takes everything would pass them all."""
    with far_device() as device:
        far, near = torch.arange(3.0, device=device), torch.ones(3)
        assert (far + far).device == device and (far + 1).sum().item() == 6
        assert far.cpu().device.type == "cpu" and far[torch.tensor([1])].tolist() == [1.0]
        refused: list[Callable[[], object]] = [
            lambda: far + near,
            lambda: near[far.long()],
            lambda: torch.cat([far, near]),
            lambda: near.add_(far),
            lambda: far.numpy(),
            lambda: np.asarray(far),
        ]
        for attempt in refused:
            with pytest.raises((RuntimeError, TypeError)):
                attempt()


@pytest.mark.parametrize("make", [full, thin])
@pytest.mark.parametrize("places", ["far far", "far cpu", "cpu far"])
def test_texts_do_not_depend_on_the_devices_of_the_towers(
    make: Callable[[], TwoTower], places: str, tmp_path: Path
) -> None:
    """Guards against a tensor made on the CPU in the middle of a pass: it works everywhere but on
    a GPU, which this machine need not have."""
    modes = [mode for mode in MODES if make is full or mode["mode"] in ("ar", "speculative")]
    expected = [texts(make(), mode) for mode in modes]
    if make is full:
        save_two_towers(make(), tmp_path / "m")
    else:
        save_backbone(make(), tmp_path / "m")
        save_denoiser(make(), tmp_path / "d", "me/model")
    with far_device():
        context, denoiser = places.split()
        towers = "both" if make is full else "context"
        model = load_checkpoint(
            tmp_path / "m", context_device=context, denoiser_device=denoiser, towers=towers
        )
        if make is thin:
            model = load_denoiser(model, tmp_path / "d", torch.device(denoiser))
        for mode, known in zip(modes, expected, strict=True):
            assert texts(model, mode) == known, mode
        engine = EngineOptions(batch_size=2, prefix_cache_bytes=1 << 20)
        assert texts(model, modes[0], engine) == expected[0]


@pytest.mark.parametrize("make", [full, thin])
def test_passes_of_fixed_shapes_do_not_depend_on_the_device(make: Callable[[], TwoTower]) -> None:
    """Guards the graphs backend, as above."""
    modes = [mode for mode in MODES if make is full or mode["mode"] in ("ar", "speculative")]
    expected = [texts(accelerate(make(), "graphs"), mode) for mode in modes]
    with far_device() as device:
        model = make().to(device)
        model = model.with_backend(GraphsBackend(model))  # `accelerate` would ask for CUDA
        for mode, known in zip(modes, expected, strict=True):
            assert texts(model, mode) == known, mode


def test_scores_do_not_depend_on_the_device() -> None:
    """Guards `score_texts`, as above."""
    expected = score_texts(full(), PROMPTS, PROMPTS[::-1])
    with far_device() as device:
        found = score_texts(full().to(device), PROMPTS, PROMPTS[::-1])
    for one, known in zip(found, expected, strict=True):
        assert one.log_likelihood == pytest.approx(known.log_likelihood, rel=1e-5)


def test_training_a_thin_denoiser_does_not_depend_on_the_device(tmp_path: Path) -> None:
    """Guards the features of answers, the steps and the curve of `adapt`, as above."""

    def losses(model: TwoTower, name: str) -> tuple[list[float], float]:
        (folder := tmp_path / name).mkdir()
        write_part(model, tiny_adapt.answers(24), model.config.reads, folder / "part-0.safetensors")
        places, features = find_places(folder), tiny_adapt.features_of(model)
        trainer = Trainer(model, features, StepOptions())
        found = [trainer.take_step(places, 0.0) for _ in range(3)]
        return found, measure(model, features, places).tokens_per_cycle

    expected, per_cycle = losses(thin(), "near")
    with far_device() as device:
        found, far_per_cycle = losses(thin().to(device), "far")
    assert found == pytest.approx(expected, rel=2e-2)  # the CPU's may be of bfloat16
    assert far_per_cycle == pytest.approx(per_cycle, rel=0.1)


RECIPES: dict[str, dict[str, object]] = {
    "denoiser": {"targets": "completion", "denoised_blocks_per_row": 3, "mask_rate_per": "block"},
    "both towers": {"train_context": True, "ar_loss_weight": 0.5, "activation_checkpointing": True},
    "tied": {"towers": "tied-ar", "optimizer": "muon"},
    "thin": {"reads": [0, 1], "bigram_rank": 4, "accumulate": 2},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_does_not_depend_on_the_device(recipe: str, tmp_path: Path) -> None:
    """Guards the recipes of `train`, as above."""
    shard = make_shard(tmp_path / "shard", align=4)
    backbone = make_backbone(shard, tmp_path / "backbone", steps=1)

    def losses(device: str) -> list[float]:
        asked = denoiser(shard, backbone, tmp_path / device, device=device, **RECIPES[recipe])
        return [report.loss for report in islice(train_steps(asked), 3)]

    expected = losses("cpu")
    with far_device():
        assert losses("far") == pytest.approx(expected, rel=1e-4)
