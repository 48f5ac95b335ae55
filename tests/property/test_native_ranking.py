"""The most probable tokens by the native library, against the plain code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import tiny_model
from twotower.diffusion import most_probable
from twotower.native import library
from twotower.native.backend import NativeBackend

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def backend() -> NativeBackend:
    return NativeBackend(tiny_model(hybrid_override_pattern="M*-"), "none")


@given(
    size=st.integers(1, 300),
    count=st.integers(1, 4),
    seed=st.integers(0, 1000),
    is_tied=st.booleans(),
    num_unused=st.integers(0, 3),
    is_chosen=st.booleans(),
)
def test_the_same_tokens_and_probabilities(
    backend: NativeBackend,
    size: int,
    count: int,
    seed: int,
    is_tied: bool,
    num_unused: int,
    is_chosen: bool,
) -> None:
    """Guards drafts and commits: a block of 64 that is passed over, a tie that goes to the higher
    id, an unused id or the mask that is chosen, a second place that repeats the first.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(2, 5, size, generator=generator)
    if is_tied:
        logits = logits.round()
    unused = torch.randperm(size, generator=generator)[: min(num_unused, size - 1)].tolist()
    logits[..., seed % size] = float("-inf") if size > num_unused + 1 else 0.0  # as the mask is
    chosen = torch.randint(size, (2, 5), generator=generator) if is_chosen else None
    ids, probs = backend.rank(logits, count, unused, chosen)
    expected_ids, expected_probs = most_probable(logits, count, unused, chosen)
    torch.testing.assert_close(probs[..., 0], expected_probs[..., 0], atol=1e-7, rtol=2e-6)
    assert torch.equal(ids[..., 0], expected_ids[..., 0])
    left = [i for i in range(size) if i not in unused]
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        own, first = logits[tuple(at)], int(ids[tuple(at)][0])
        others = sorted((i for i in left if i != first), key=lambda i: (-own[i].item(), i))
        known = [i for i in others if own[i] > float("-inf")][: count - 1]
        assert ids[tuple(at)][1 : 1 + len(known)].tolist() == known
        whole = own.softmax(-1)
        torch.testing.assert_close(
            probs[tuple(at)][1 : 1 + len(known)], whole[known], atol=1e-7, rtol=2e-6
        )
        assert not probs[tuple(at)][1 + len(known) :].any()


def test_a_tokens_confidence_does_not_depend_on_its_neighbours(backend: NativeBackend) -> None:
    """Guards the independence of rows: one beside a row that samples has its own choice handed in,
    and must be as sure of it, to the bit.
    """
    logits = torch.randn(3, 4, 100, generator=torch.Generator().manual_seed(1))
    ids, probs = backend.rank(logits)
    again = backend.rank(logits[1:2], chosen=ids[1:2, :, 0])
    assert torch.equal(again[0], ids[1:2]) and torch.equal(again[1], probs[1:2])
