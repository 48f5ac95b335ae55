"""Time features and modulation by hand, and against the recorded tensors of the official code."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recorded import GOLDEN
from tiny_models import fresh_model, masked_like, random_ids, tiny_model
from twotower.layers.adaln import Modulation, time_features
from twotower.layers.mamba2 import Mamba2
from twotower.model.eager import modulations


def test_features_by_hand() -> None:
    """128 cosines, then 128 sines, of 1000 t times falling frequencies."""
    t = 0.25
    found = time_features(torch.tensor([t, 0.0]), torch.float32)
    assert found.shape == (2, 256)
    for j in (0, 1, 64, 127):
        angle = 1000 * t * math.exp(-math.log(10000) * j / 128)
        assert found[0, j].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert found[0, 128 + j].item() == pytest.approx(math.sin(angle), abs=1e-5)
    assert torch.equal(found[1], torch.tensor([1.0] * 128 + [0.0] * 128))


def test_bfloat16_rounds_t_and_then_1000_t() -> None:
    """Guards what the released weights were trained with: 0.625 stands for 624."""
    found = time_features(torch.tensor([0.625]), torch.bfloat16)
    exact = torch.tensor([math.cos(624.0), math.cos(625.0)]).bfloat16()
    assert found[0, 0] == exact[0]
    assert found[0, 0] != exact[1]


def test_any_shape_of_t() -> None:
    t = torch.rand(2, 3)
    found = time_features(t, torch.float32)
    assert found.shape == (2, 3, 256)
    assert torch.equal(found[1, 2], time_features(t[1, 2], torch.float32))


class Given(nn.Module):
    """An embedder that answers with a fixed tensor."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, t: Tensor) -> Tensor:
        return self.value.view(*t.shape, -1)


def test_recorded_modulation() -> None:
    """Guards the order shift, scale, gate and the sum with the layer's table."""
    golden = {
        name.removeprefix("mod/"): value
        for name, value in load_file(GOLDEN / "sampler" / "golden.safetensors").items()
        if name.startswith("mod/")
    }
    model = fresh_model(hidden_size=6, hybrid_override_pattern="M").requires_grad_(False)
    model.t_embedder = Given(golden["t_emb"])  # type: ignore[assignment]
    model.t_block = nn.Sequential()
    model.scale_shift_tables[0].copy_(golden["table"])
    (found,) = modulations(model, torch.zeros(3, 1))
    for name, value in zip(Modulation._fields, found, strict=True):
        assert value.shape == (3, 1, 1, 6)
        torch.testing.assert_close(value[:, 0, 0], golden[name])
    x = golden["x"].unsqueeze(1)  # (3, 4, 6) as (B, K = 1, T, D)
    modulated = x * (1 + found.scale) + found.shift
    torch.testing.assert_close(modulated[:, 0], golden["modulated"])
    layer = model.context_tower.layers[0]
    assert isinstance(layer.mixer, Mamba2)
    _, normed = layer.norm(golden["modulated"])
    torch.testing.assert_close(layer.pre_norm(x, None, found)[1][:, 0], normed)


def test_t_none_is_no_modulation_and_not_t_zero() -> None:
    """Guards mock-AR and unconditioned models: no shift, no scale, no gate."""
    model = tiny_model()
    block, view = masked_like(random_ids(1, 4)), model.prefill(random_ids(1, 5)).view()
    none = model.denoise(block, view, None)
    zero = model.denoise(block, view, torch.tensor([0.0]))
    assert float((none - zero).abs().max()) > 0.01
    neutral = fresh_model().requires_grad_(False)
    neutral.t_block[1].weight.zero_()
    neutral.t_block[1].bias.zero_()
    for table in neutral.scale_shift_tables:
        table.copy_(torch.tensor([0.0, 0.0, 1.0]).unsqueeze(1).expand_as(table))
    conditioned = neutral.denoise(block, view, torch.tensor([0.5]))
    torch.testing.assert_close(conditioned, none, rtol=0, atol=1e-5)


def test_t_reaches_every_layer() -> None:
    """Guards per-layer tables: each layer has its own, and each is used."""
    block = masked_like(random_ids(1, 4))
    t = torch.tensor([0.5])
    before = tiny_model().denoise(block, tiny_model().empty_cache(1).view(), t)
    for index in range(len(tiny_model().scale_shift_tables)):
        for part in range(3):
            model = fresh_model().requires_grad_(False)
            model.scale_shift_tables[index][part] += 0.5
            after = model.denoise(block, model.empty_cache(1).view(), t)
            assert float((after - before).abs().max()) > 1e-4, (index, Modulation._fields[part])
