"""What noisy and clean blocks may know of each other, and gradients between the towers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import fresh_model, masked_like, random_ids, tiny_model
from twotower import TwoTower

T, K = 4, 3
MODEL = tiny_model()
# The same numbers by another route: float32 rounding through 6 layers.
CLOSE = {"rtol": 0.0, "atol": 2e-4}


def logits(clean: Tensor, noisy: Tensor, t: Tensor | None, model: TwoTower = MODEL) -> Tensor:
    with torch.no_grad():
        return model.training_logits(clean, noisy, t, T).unflatten(1, (-1, T))


def changed_blocks(before: Tensor, after: Tensor) -> list[int]:
    """Blocks whose logits (B, K, T, V) differ by more than rounding."""
    difference = (before - after).abs().amax((0, 2, 3))
    return [block for block, value in enumerate(difference.tolist()) if value > 1e-4]


def replaced(ids: Tensor, block: int, seed: int) -> Tensor:
    """ids with all tokens of one block moved to other ids."""
    ids = ids.clone()
    span = slice(block * T, (block + 1) * T)
    ids[:, span] = 4 + (ids[:, span] - 4 + 1 + seed) % 37
    return ids


@given(block=st.integers(0, K - 1), seed=st.integers(0, 30), has_t=st.booleans())
def test_a_noisy_block_is_seen_by_itself_alone(block: int, seed: int, has_t: bool) -> None:
    """Guards against a leak between noisy blocks: training would look good and generation, where
    later blocks do not exist yet, would not."""
    clean = random_ids(2, K * T, seed=seed)
    noisy = masked_like(clean, seed)
    t = torch.tensor([0.3, 0.9]) if has_t else None
    after = logits(clean, replaced(noisy, block, seed), t)
    assert changed_blocks(logits(clean, noisy, t), after) == [block]


@given(block=st.integers(0, K - 1), seed=st.integers(0, 30))
def test_a_clean_block_is_seen_by_later_blocks_alone(block: int, seed: int) -> None:
    """Guards against the answer leaking: a block that sees its own clean tokens trains to copy,
    with a loss near zero and a useless model."""
    clean = random_ids(2, K * T, seed=seed)
    noisy = masked_like(clean, seed)
    t = torch.tensor([0.3, 0.9])
    after = logits(replaced(clean, block, seed), noisy, t)
    assert changed_blocks(logits(clean, noisy, t), after) == list(range(block + 1, K))


@pytest.mark.parametrize("symbol", ["M", "*"])
@pytest.mark.parametrize("position", range(T))
def test_who_sees_whom_inside_a_block(symbol: str, position: int) -> None:
    """Guards the two mixers' views of a block: attention both ways, Mamba forward only."""
    model = tiny_model(hybrid_override_pattern=symbol)
    clean = random_ids(1, T)
    noisy = random_ids(1, T, seed=1)
    other = noisy.clone()
    other[0, position] = 4 + (noisy[0, position] - 3) % 37
    before, after = (logits(clean, ids, None, model) for ids in (noisy, other))
    seen = (before - after).abs().amax(-1).flatten() > 1e-6
    assert seen.tolist() == [symbol == "*" or i >= position for i in range(T)]


@given(position=st.integers(0, 11), seed=st.integers(0, 30))
def test_the_context_tower_is_causal(position: int, seed: int) -> None:
    """Guards next-token training and AR decoding against a look at the answer."""
    ids = random_ids(1, 12, seed=seed)
    other = ids.clone()
    other[0, position] = 4 + (ids[0, position] - 3) % 37
    with torch.no_grad():
        before, after = MODEL.context_logits(ids), MODEL.context_logits(other)
    seen = (before - after).abs().amax(-1).flatten() > 1e-5
    assert seen.tolist() == [i >= position for i in range(12)]


@given(
    num_blocks=st.integers(1, 4),
    block_size=st.integers(1, 6),
    time=st.sampled_from(["none", "row", "block"]),
    seed=st.integers(0, 30),
)
def test_all_blocks_at_once_equal_one_at_a_time(
    num_blocks: int, block_size: int, time: str, seed: int
) -> None:
    """Guards training = generation: states moved by a block too few or too many, or a t that
    lands on the wrong block, shows in no loss curve."""
    clean = random_ids(2, num_blocks * block_size, seed=seed)
    noisy = masked_like(clean, seed)
    per_block = torch.rand(2, num_blocks, generator=torch.Generator().manual_seed(seed))
    if time == "row":
        per_block = per_block[:, :1].expand(-1, num_blocks)
    t = {"none": None, "row": per_block[:, 0], "block": per_block}[time]
    with torch.no_grad():
        at_once = MODEL.training_logits(clean, noisy, t, block_size)
    for block in range(num_blocks):
        start, end = block * block_size, (block + 1) * block_size
        cache = MODEL.prefill(clean[:, :start]) if start else MODEL.empty_cache(2)
        now = None if t is None else per_block[:, block]
        alone = MODEL.denoise(noisy[:, start:end], cache.view(), now)
        torch.testing.assert_close(at_once[:, start:end], alone, **CLOSE)


def context_gradients(model: TwoTower) -> dict[str, Tensor | None]:
    clean = random_ids(2, K * T)
    t = torch.tensor([0.4, 0.8])
    model.training_logits(clean, masked_like(clean), t, T).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if n.startswith("context_")}


def test_a_frozen_context_tower_gets_no_gradient_and_no_graph() -> None:
    """Guards frozen training: gradients for the context tower cost half the memory and, with an
    optimiser that holds them, would change the AR model."""
    model = fresh_model()
    model.context_tower.requires_grad_(False)
    model.context_lm_head.requires_grad_(False)
    assert all(gradient is None for gradient in context_gradients(model).values())
    denoiser = {n: p for n, p in model.named_parameters() if not n.startswith("context_")}
    missing = [n for n, p in denoiser.items() if p.grad is None or not bool(p.grad.any())]
    assert missing == [], "everything else learns"


@pytest.mark.parametrize(("symbol", "reached"), [("*", "k_proj v_proj"), ("M", "in_proj conv1d")])
def test_an_unfrozen_context_tower_learns_through_keys_values_and_states(
    symbol: str, reached: str
) -> None:
    """Guards the unfrozen variant: a detached cache trains without error and without effect."""
    found = context_gradients(fresh_model(hybrid_override_pattern=symbol))
    for part in reached.split():
        name = f"context_tower.layers.0.mixer.{part}.weight"
        gradient = found[name]
        assert gradient is not None and bool(gradient.any()), name
    assert found["context_lm_head.weight"] is None, "the denoiser's loss does not see this head"


def test_gradients_cross_the_boundary_states_exactly() -> None:
    """Guards the gradient through the boundary states against a wrong sum: a finite difference."""
    model = fresh_model(hybrid_override_pattern="M")
    clean, t = random_ids(1, K * T), torch.tensor([0.5])
    noisy = masked_like(clean)
    weight = model.context_tower.layers[0].mixer.A_log

    def loss() -> Tensor:
        return model.training_logits(clean, noisy, t, T).double().square().mean()

    (gradient,) = torch.autograd.grad(loss(), [weight])
    step = 1e-2
    with torch.no_grad():
        for head in range(len(weight)):
            weight[head] += step
            above = loss()
            weight[head] -= 2 * step
            below = loss()
            weight[head] += step
            numeric = float(above - below) / (2 * step)
            assert abs(numeric - float(gradient[head])) < 2e-3 * float(gradient.abs().max())


def test_chosen_blocks_are_those_of_the_whole_row() -> None:
    """Guards: a chosen block that reads another block's past, or its own double beside it."""
    clean = random_ids(2, 12)
    index = torch.tensor([[2, 0, 2], [1, 1, 0]])
    noisy = masked_like(clean).unflatten(1, (3, 4))
    rows = torch.arange(2).unsqueeze(1)
    t = torch.rand(2, 3)
    chosen = noisy[rows, index].clone()
    chosen[0, 2] = 7  # the second copy of block 2 holds other tokens than the first
    with torch.no_grad():
        found = MODEL.training_logits(clean, chosen.flatten(1), t, 4, index).unflatten(1, (3, 4))
        for row in range(2):
            for place in range(3):
                block = noisy[row : row + 1].clone()
                number = int(index[row, place])
                block[0, number] = chosen[row, place]
                times = torch.zeros(1, 3)
                times[0, number] = t[row, place]
                whole = MODEL.training_logits(clean[row : row + 1], block.flatten(1), times, 4)
                torch.testing.assert_close(found[row, place], whole.unflatten(1, (3, 4))[0, number])


def test_shapes_that_do_not_fit_are_refused() -> None:
    clean = random_ids(1, 6)
    with pytest.raises(ValueError, match="multiple of block_size=4"):
        MODEL.training_logits(clean, clean, None, 4)
    with pytest.raises(ValueError, match=r"noisy has shape \(1, 4\)"):
        MODEL.training_logits(clean, clean[:, :4], None, 2)
