"""Mixers, norms and the order of a layer, by hand and against loops written from the equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_models import fresh_model, tiny_config, tiny_model
from twotower.layers.adaln import Modulation
from twotower.layers.attention import KV, Attention
from twotower.layers.mamba2 import Mamba2, MambaState
from twotower.layers.mlp import MLP
from twotower.model.layer import Layer
from twotower.specs import SPECS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: str, seed: int = 0, **changes: object) -> Layer:
    """A layer with random weights, which the test may change."""
    model = fresh_model(seed, hybrid_override_pattern=kind, **changes).requires_grad_(False)
    found = model.context_tower.layers[0]
    assert isinstance(found, Layer)
    return found


def mamba(**changes: object) -> Mamba2:
    mixer = layer("M", **changes).mixer
    assert isinstance(mixer, Mamba2)
    return mixer


def naive_mamba(m: Mamba2, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """One row x (L, D), token by token in float64 -> y (L, D), conv (C, W-1), ssm (H, P, N)."""
    w = {name: value.double() for name, value in m.state_dict().items()}
    heads, groups, size = m.num_heads, m.num_groups, m.state_size
    projected = x.double() @ w["in_proj.weight"].T + w.get("in_proj.bias", torch.zeros(()))
    z, xbc, dt = projected.split([m.width, m.width + 2 * groups * size, heads], dim=-1)
    history = torch.zeros(m.conv_width - 1, xbc.shape[1], dtype=torch.float64)
    history = torch.cat([history, xbc])
    state = torch.zeros(heads, m.head_dim, size, dtype=torch.float64)
    outputs = []
    for token in range(len(x)):
        window = history[token : token + m.conv_width]
        mixed = (window * w["conv1d.weight"].squeeze(1).T).sum(0)
        mixed = F.silu(mixed + w.get("conv1d.bias", torch.zeros(())))
        values, B, C = mixed.split([m.width, groups * size, groups * size])
        values = values.view(heads, m.head_dim)
        B, C = (v.view(groups, size).repeat_interleave(heads // groups, 0) for v in (B, C))
        delta = F.softplus(dt[token] + w["dt_bias"])[:, None, None]
        decay = (-w["A_log"].exp()[:, None, None] * delta).exp()
        state = decay * state + delta * values[:, :, None] * B[:, None, :]
        y = (state * C[:, None, :]).sum(-1) + w["D"][:, None] * values
        y = (y.flatten() * F.silu(z[token])).view(groups, -1)
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
        outputs.append((y.flatten() * w["norm.weight"]) @ w["out_proj.weight"].T)
    bias = w.get("out_proj.bias", torch.zeros(()))
    return torch.stack(outputs) + bias, history[len(x) :].T, state


@pytest.mark.parametrize(
    "changes", [{}, {"use_bias": True}, {"use_conv_bias": False}, {"conv_kernel": 2}], ids=str
)
def test_mamba_is_the_recurrence(changes: dict[str, object]) -> None:
    """Guards order of the projection's parts, taps, groups, D, and the gate before the norm."""
    m = mamba(**changes)
    x = noise(2, 9, 16)
    y, state = m(x, None, None, 9)
    for row in range(2):
        expected_y, conv, ssm = naive_mamba(m, x[row], 1e-5)
        torch.testing.assert_close(y[row].double(), expected_y, **CLOSE)
        torch.testing.assert_close(state.conv[row, 0].double(), conv, **CLOSE)
        torch.testing.assert_close(state.ssm[row, 0].double(), ssm, **CLOSE)


def test_mamba_gives_the_state_after_every_stretch() -> None:
    """Guards boundary states of training: each is the state of the sequence cut there."""
    m = mamba()
    x = noise(2, 12, 16)
    _, states = m(x, None, None, 4)
    assert states.conv.shape == (2, 3, m.conv1d.in_channels, 3)
    assert states.ssm.shape == (2, 3, 4, 8, 8)
    for block in range(3):
        _, cut = m(x[:, : 4 * (block + 1)], None, None, 4 * (block + 1))
        torch.testing.assert_close(states.conv[:, block], cut.conv[:, 0], **CLOSE)
        torch.testing.assert_close(states.ssm[:, block], cut.ssm[:, 0], **CLOSE)


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 11])
def test_mamba_goes_on_from_its_state(cut: int) -> None:
    """Guards cuts shorter than the convolution, where part of the old window must stay."""
    m = mamba()
    x = noise(2, 12, 16)
    whole, end = m(x, None, None, 12)
    y, state = m(x[:, :cut], None, None, cut)
    past = MambaState(state.conv[:, 0], state.ssm[:, 0])
    rest, last = m(x[:, cut:], past, None, 12 - cut)
    torch.testing.assert_close(torch.cat([y, rest], dim=1), whole, **CLOSE)
    torch.testing.assert_close(last.conv, end.conv, **CLOSE)
    torch.testing.assert_close(last.ssm, end.ssm, **CLOSE)


def test_mamba_counts_stop_each_row_at_its_last_token() -> None:
    m = mamba()
    x = noise(4, 5, 16)
    past = MambaState(noise(4, m.conv1d.in_channels, 3), noise(4, 4, 8, 8))
    _, state = m(x, past, torch.tensor([0, 1, 4, 5]), 5)
    for row, count in enumerate([0, 1, 4, 5]):
        own = MambaState(*(part[row : row + 1] for part in past))
        expected = own
        if count:
            _, after = m(x[row : row + 1, :count], own, None, count)
            expected = MambaState(after.conv[:, 0], after.ssm[:, 0])
        torch.testing.assert_close(state.conv[row], expected.conv, **CLOSE)
        torch.testing.assert_close(state.ssm[row], expected.ssm, **CLOSE)


def test_the_step_size_is_not_clamped() -> None:
    """Guards a fact of the released model: time_step_min and max are for initialisation only."""
    m = mamba(time_step_min=0.05, time_step_max=0.1, time_step_floor=0.05)
    for bias in (-12.0, 4.0):  # steps near 6e-6 and 4
        m.dt_bias.fill_(bias)
        x = noise(1, 6, 16)
        y, _ = m(x, None, None, 6)
        torch.testing.assert_close(y[0].double(), naive_mamba(m, x[0], 1e-5)[0], **CLOSE)


def test_attention_sees_the_past_before_its_own_tokens() -> None:
    """Guards the order of keys (masks count on it) and what is handed to the cache."""
    mixer = layer("*").mixer
    assert isinstance(mixer, Attention)
    x = noise(2, 5, 16)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    whole, kv = mixer(x, None, allowed)
    assert kv.k.shape == kv.v.shape == (2, 5, 2, 8)
    past = KV(kv.k[:, :3], kv.v[:, :3])
    rest, own = mixer(x[:, 3:], past, allowed[3:])
    torch.testing.assert_close(rest, whole[:, 3:], **CLOSE)
    torch.testing.assert_close(own.k, kv.k[:, 3:], **CLOSE)
    assert own.k.shape[1] == 2, "this call's tokens alone"


def test_attention_has_no_positions() -> None:
    """Guards against a positional embedding: without a mask, order of keys does not matter."""
    mixer = layer("*").mixer
    x = noise(1, 6, 16)
    y, _ = mixer(x, None, None)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled, _ = mixer(x[:, order], None, None)
    torch.testing.assert_close(shuffled, y[:, order], **CLOSE)


def test_mlp_by_hand() -> None:
    mlp = MLP(2, 3, bias=True).requires_grad_(False)
    mlp.up_proj.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    mlp.up_proj.bias.copy_(torch.tensor([0.0, 0.0, -1.0]))
    mlp.down_proj.weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 2.0]]))
    mlp.down_proj.bias.copy_(torch.tensor([0.5, 0.0]))
    # up: 3, -2, 0 -> relu2: 9, 0, 0;   up: 1, 2, 2 -> 1, 4, 4
    found = mlp(torch.tensor([[3.0, -2.0], [1.0, 2.0]]))
    torch.testing.assert_close(found, torch.tensor([[9.5, 0.0], [9.5, 8.0]]))


def modulation(width: int) -> Modulation:
    return Modulation(*(0.5 * noise(1, 1, 1, width, seed=n) for n in (1, 2, 3)))


@pytest.mark.parametrize("kind", [kind.symbol for kind in SPECS])
def test_order_of_norm_and_modulation(kind: str) -> None:
    """Guards a fact of the released weights that no loss would reveal before training: Mamba and
    attention modulate and then norm, MoE and MLP norm and then modulate."""
    one = layer(kind)
    h, m = noise(2, 3, 4, 16, seed=9), modulation(16)

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * one.norm.weight

    modulate_first = norm(h * (1 + m.scale) + m.shift)
    norm_first = norm(h) * (1 + m.scale) + m.shift
    expected = {"M": modulate_first, "*": modulate_first, "E": norm_first, "-": norm_first}
    torch.testing.assert_close(one.pre_norm(h, None, m)[1], expected[kind], **CLOSE)
    torch.testing.assert_close(one.pre_norm(h)[1], norm(h), **CLOSE)
    assert float((modulate_first - norm_first).abs().max()) > 0.1


def test_residual_is_gated_outside_the_mixer() -> None:
    one = layer("-")
    h, y, m = noise(1, 1, 2, 16), noise(1, 1, 2, 16, seed=1), modulation(16)
    torch.testing.assert_close(one.pre_norm(h, (y, None))[0], h + y)
    torch.testing.assert_close(one.pre_norm(h, (y, m.gate))[0], h + m.gate * y)


def test_layers_keep_the_residuals_dtype() -> None:
    """Guards `residual_in_fp32`: the mixer works in the weights' dtype, the sum stays float32."""
    one = layer("-").bfloat16()
    h = noise(1, 1, 2, 16)
    _, u = one.pre_norm(h)
    assert u.dtype == torch.bfloat16
    small = torch.full_like(u, 2.0**-12)
    assert torch.equal(one.pre_norm(h, (small, None))[0], h + 2.0**-12)
    rounded, _ = one.pre_norm(h.bfloat16(), (small, None))
    assert rounded.dtype == torch.bfloat16


def test_norm_epsilon_comes_from_the_configuration() -> None:
    """Guards against a fixed epsilon: with a large one, small inputs stay small."""
    for kind in "M*E-":
        one = layer(kind, layer_norm_epsilon=4.0)
        one.norm.weight.fill_(1.0)
        torch.testing.assert_close(
            one.pre_norm(torch.full((1, 1, 16), 2.0))[1],
            torch.full((1, 1, 16), 2.0 / math.sqrt(8.0)),
        )
    assert mamba(layer_norm_epsilon=4.0).norm.eps == 4.0


@pytest.mark.parametrize(
    ("field", "symbol", "names"),
    [
        ("attention_bias", "*", ["q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"]),
        ("use_bias", "M", ["in_proj.bias", "out_proj.bias"]),
        ("mlp_bias", "-", ["up_proj.bias", "down_proj.bias"]),
        ("use_conv_bias", "M", ["conv1d.bias"]),
    ],
)
def test_each_bias_switch_adds_its_biases_alone(field: str, symbol: str, names: list[str]) -> None:
    plain = {"use_conv_bias": False}
    without = set(layer(symbol, **plain).mixer.state_dict())
    with_bias = set(layer(symbol, **plain | {field: True}).mixer.state_dict())
    assert with_bias - without == set(names)


def test_parameter_names_are_the_released_ones() -> None:
    """Guards the checkpoint format: a renamed module loads nothing."""
    config = tiny_config()
    names = {
        name.removeprefix("context_tower.layers.")
        for name in tiny_model().state_dict()
        if name.startswith("context_tower.layers.")
    }
    mamba_names = (
        "A_log D dt_bias conv1d.bias conv1d.weight in_proj.weight norm.weight out_proj.weight"
    )
    expected = {f"0.mixer.{name}" for name in mamba_names.split()}
    expected |= {f"1.mixer.{p}_proj.weight" for p in "qkvo"}
    moe = "gate.weight gate.e_score_correction_bias experts.up_proj experts.down_proj"
    moe += " shared_experts.up_proj.weight shared_experts.down_proj.weight"
    expected |= {f"2.mixer.{name}" for name in moe.split()}
    expected |= {f"3.mixer.{p}_proj.weight" for p in ("up", "down")}
    expected |= {f"{i}.norm.weight" for i in range(config.context.num_layers)}
    assert {name for name in names if int(name[0]) < 4} | {"4.norm.weight", "5.norm.weight"} == (
        expected
    )
    assert isinstance(tiny_model().scale_shift_tables, nn.ParameterList)
