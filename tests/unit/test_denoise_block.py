import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny_sampler import RowSampler, sampler_of
from twotower.diffusion import Step, denoise_block

MASK, VOCAB, LENGTH = 3, 9, 6
KINDS = ("confidence", "posterior", "predict-and-noise")


def denoise(tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """A pure function of each row's tokens and t; the mask token is the raw argmax."""
    place = torch.arange(1, LENGTH + 1)
    seen = (place * (tokens + 1)).sum(-1)[:, None, None] + 7 * place[:, None]
    word = torch.arange(VOCAB)
    logits = 2 * torch.sin(seen * (word + 1) * 0.37 + t[:, None, None])
    logits[..., MASK] = 50.0
    return logits


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


samplers = st.builds(
    RowSampler,
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 8),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 2.0]),
    schedule=st.sampled_from(["linear", "cosine", "exponential"]),
    remask=st.sampled_from(["confidence", "margin", "random"]),
    adaptive=st.booleans(),
    reuse_unchanged=st.booleans(),
    temperature=st.sampled_from([0.0, 0.8]),
    top_k=st.sampled_from([0, 2]),
    top_p=st.sampled_from([1.0, 0.7]),
)
blocks = st.lists(
    st.lists(st.sampled_from([MASK, MASK, 1, 4]), min_size=LENGTH, max_size=LENGTH),
    min_size=1,
    max_size=4,
).map(torch.tensor)


def run(
    block: Tensor, sampler: RowSampler | Sequence[RowSampler], seeds: Sequence[int] = ()
) -> list[Step]:
    own = sampler_of(sampler, len(block))
    return list(denoise_block(denoise, block, own, seeded(seeds or range(len(block)))))


@given(block=blocks, sampler=samplers)
def test_every_step_moves_towards_a_full_block(block: Tensor, sampler: RowSampler) -> None:
    """Guards the promises a streamed trace relies on: tokens once shown stay, the mask token is
    never predicted, passes are bounded and counted, and the last step leaves nothing open."""
    steps = run(block, sampler)
    tokens, is_masked = block, block == MASK
    nfe = torch.zeros(len(block), dtype=torch.int64)
    for index, step in enumerate(steps):
        assert step.index == index < sampler.steps
        assert torch.equal(step.is_masked, step.tokens == MASK)
        assert not (step.is_masked & ~is_masked).any()
        assert torch.equal(step.tokens[~is_masked], tokens[~is_masked])
        assert is_masked[step.rows].any(-1).all()  # no pass for a finished row
        nfe[step.rows] += 1
        assert torch.equal(step.nfe, nfe)
        assert bool(((step.confidence > 0) & (step.confidence <= 1)).all())
        if sampler.kind == "confidence":
            open_rows = is_masked.any(-1)
            fraction = is_masked.float().mean(-1)
            assert torch.equal(step.t, fraction)
            assert bool((step.is_masked.sum(-1) < is_masked.sum(-1))[open_rows].all())
        tokens, is_masked = step.tokens, step.is_masked
    assert not is_masked.any()
    assert int(nfe.max()) <= sampler.steps
    assert bool((step.confidence == 1)[block != MASK].all()) if steps else True


@given(block=blocks, sampler=samplers, data=st.data())
def test_a_row_is_the_same_alone_batched_and_permuted(
    block: Tensor, sampler: RowSampler, data: st.DataObject
) -> None:
    """Guards batched serving: steps, threshold, temperature, top-k, top-p, generator and reuse
    are the row's own, so its tokens and passes must not depend on who else is in the batch."""
    choice = st.sampled_from([0.0, 0.5, 1.2])
    per_row = [
        dataclasses.replace(
            sampler,
            steps=data.draw(st.integers(1, 8)),
            temperature=data.draw(choice),
            threshold=data.draw(choice),
            top_k=data.draw(st.integers(0, 3)),
        )
        for _ in block
    ]
    order = data.draw(st.permutations(range(len(block))))
    steps = run(block, per_row)
    permuted = run(block[list(order)], [per_row[row] for row in order], order)
    for row in range(len(block)):
        alone = run(block[row : row + 1], per_row[row], [row])
        place = order.index(row)
        for index, step in enumerate(alone):
            assert torch.equal(step.tokens[0], steps[index].tokens[row])
            assert torch.equal(step.tokens[0], permuted[index].tokens[place])
            assert torch.equal(step.confidence[0], steps[index].confidence[row])
            assert step.t[0] == steps[index].t[row]
            assert step.nfe[0] == steps[index].nfe[row] == permuted[index].nfe[place]
        assert all(
            torch.equal(step.tokens[row], steps[-1].tokens[row]) for step in steps[len(alone) :]
        )


def test_confidence_is_unscaled_and_without_the_mask_token() -> None:
    """Guards the threshold's meaning: it must not move with temperature, top-k or the ban."""
    block = torch.full((1, LENGTH), MASK)
    logits = denoise(block, torch.ones(1), torch.zeros(1))
    keep = [v for v in range(VOCAB) if v != MASK]
    probs = torch.zeros_like(logits)
    probs[..., keep] = logits[..., keep].softmax(-1)
    for temperature, top_k in ((0.0, 0), (0.2, 0), (3.0, 0), (1.0, 2)):
        sampler = RowSampler(steps=1, temperature=temperature, top_k=top_k)
        (step,) = run(block, sampler)
        expected = probs.gather(-1, step.tokens[..., None]).squeeze(-1)
        torch.testing.assert_close(step.confidence, expected)


def test_the_next_most_probable_tokens_of_each_cell() -> None:
    """Guards branches of drafts: tokens of the draft vocabulary, none of them the one chosen, and
    none where nothing was masked.
    """
    block, ids = torch.full((2, LENGTH), MASK), torch.arange(100, 100 + VOCAB)
    block[0, 1] = 7
    sampler = dataclasses.replace(sampler_of(RowSampler(steps=1), 2), num_others=2)
    (step,) = denoise_block(denoise, block, sampler, token_ids=ids)
    logits = denoise(block, (block == MASK).float().mean(-1), torch.zeros(2))
    logits[..., MASK] = float("-inf")
    probs, best = logits.softmax(-1).topk(3)
    assert step.others is not None
    tokens, probabilities = step.others
    is_masked = block == MASK
    assert torch.equal(tokens[is_masked], ids[best[..., 1:]][is_masked])
    torch.testing.assert_close(probabilities[is_masked], probs[..., 1:][is_masked])
    assert probabilities[0, 1].tolist() == [0.0, 0.0]
    (without,) = denoise_block(denoise, block, sampler_of(RowSampler(steps=1), 2))
    assert without.others is None
    few = torch.tensor([[[0.0, 2.0]] * LENGTH] * 2)  # logits of a draft vocabulary of two
    (step,) = denoise_block(lambda *_: few, block, sampler, token_ids=torch.tensor([50, 60]))
    assert step.others is not None and step.others[0][0, 0, 0] == 50


def test_temperature_zero_needs_no_generators_and_no_luck() -> None:
    block = torch.full((2, LENGTH), MASK)
    (step,) = denoise_block(denoise, block, sampler_of(RowSampler(steps=1), 2))
    logits = denoise(block, torch.ones(2), torch.zeros(2))
    logits[..., MASK] = -1e9
    assert torch.equal(step.tokens, logits.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_greedy_row_ignores_its_generator(kind: Any) -> None:
    """Guards mixed batches: a neighbour that samples must not turn a greedy row random."""
    block = torch.full((2, LENGTH), MASK)
    greedy = RowSampler(kind=kind, steps=5)
    mixed = run(block, [greedy, dataclasses.replace(greedy, temperature=1.0)])
    alone = list(denoise_block(denoise, block[:1], sampler_of(greedy)))
    assert [step.tokens[0].tolist() for step in mixed][: len(alone)] == [
        step.tokens[0].tolist() for step in alone
    ]


def test_posterior_ends_without_masks() -> None:
    """Guards the end of the grid: at t = 1e-5 staying masked can be likelier than any token."""
    block = torch.full((1, 2), MASK)
    sampler = RowSampler(kind="posterior", steps=1)
    (step,) = denoise_block(
        lambda x, t, rows: torch.zeros(1, 2, 200_000), block, sampler_of(sampler)
    )
    assert not step.is_masked.any()


def test_posterior_keeps_tokens_masked_with_the_schedule() -> None:
    """Guards the sampled posterior: after step k of n a fraction 1 - k/n is still masked."""
    block = torch.full((400, LENGTH), MASK)
    steps = run(block, RowSampler(kind="posterior", steps=4, temperature=1.0))
    for index, step in enumerate(steps[:3]):
        share = step.is_masked.float().mean().item()
        assert share == pytest.approx(1 - (index + 1) / 4, abs=0.03)
        assert bool((step.rows.diff() > 0).all())  # callers may index their cache with them


def test_full_block_makes_no_pass() -> None:
    def fail(tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("a finished block was denoised")

    assert (
        list(denoise_block(fail, torch.ones(2, LENGTH).long(), sampler_of(RowSampler(), 2))) == []
    )


def test_the_callers_block_is_left_alone() -> None:
    block = torch.full((2, LENGTH), MASK)
    steps = run(block, RowSampler(steps=3))
    assert bool((block == MASK).all())
    assert len({step.tokens.data_ptr() for step in steps}) == len(steps)


@pytest.mark.parametrize("sampler", [{"temperature": 1.0}, {"kind": KINDS[2], "remask": "random"}])
@pytest.mark.parametrize("num_generators", [0, 1])
def test_what_is_random_needs_a_generator_for_each_row(
    sampler: dict[str, Any], num_generators: int
) -> None:
    block = torch.full((2, LENGTH), MASK)
    own = sampler_of(RowSampler(**sampler), 2)
    with pytest.raises(AssertionError):
        next(denoise_block(denoise, block, own, seeded(range(num_generators))))


def test_damaged_logits_do_not_loop_forever() -> None:
    """Silent failure: with NaN every comparison is false and the posterior sampler never ends."""
    block = torch.full((1, 4), 3)
    sampler = RowSampler(kind="posterior", steps=3, mask_token_id=3)
    own = sampler_of(sampler)
    steps = denoise_block(lambda tokens, t, rows: torch.full((1, 4, 8), torch.nan), block, own)
    assert sum(1 for _ in itertools.islice(steps, 10)) == 3
