"""The most probable tokens by the native library, against the plain code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tiny_models import tiny_model
from twotower.diffusion import argmax, ban, most_probable
from twotower.model.precision import Scheme
from twotower.native import library
from twotower.native.backend import NativeBackend
from twotower.native.weights import native_head

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


@given(
    rows=st.integers(1, 700),
    num_tokens=st.integers(1, 70),
    seed=st.integers(0, 1000),
    quantization=st.sampled_from(["none", "int8"]),
    num_unused=st.integers(0, 3),
    threads=st.sampled_from([1, 3]),
)
def test_the_best_of_a_head_without_its_logits(
    rows: int, num_tokens: int, seed: int, quantization: str, num_unused: int, threads: int
) -> None:
    """Guards AR and verified text: a piece of the head that is left out, the rest of a block of 16
    that wins with what lay there, the higher id at a tie, an unused id.
    """
    torch.manual_seed(seed)
    head = nn.Linear(32, rows, bias=False)
    with torch.no_grad():
        head.weight[rows // 2 :] = head.weight[: rows - rows // 2].clone()  # ties
        head.weight -= 0.2  # negative logits: an empty row would be the best
    x = torch.rand(num_tokens, 32)
    scheme = Scheme(weights="int8", activations="int8") if quantization == "int8" else None
    native = native_head(head.requires_grad_(False), scheme)
    assert native is not None
    unused = torch.randperm(rows)[: min(num_unused, rows - 1)].tolist()
    native._is_shared = threads > 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native.best(x, unused)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, argmax(ban(native(x), unused)))


def test_logits_that_are_not_finite_have_no_best() -> None:
    """Guards damaged weights: text of the first token for ever, without a word."""
    head = nn.Linear(32, 100, bias=False).requires_grad_(False)
    head.weight[70, 3] = float("nan")
    native = native_head(head, None)
    assert native is not None
    x = torch.ones(5, 32)
    x[2] = 0.0
    assert native.best(x, []).tolist() == [-1] * 5  # NaN times 0 is NaN
    head.weight[70, 3] = float("inf")
    x[:, 3] = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0])
    assert native.best(x, []).tolist() == [-1] * 5
    head.weight[70, 3] = 1.0
    assert min(native.best(x, []).tolist()) >= 0
