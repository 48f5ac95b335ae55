"""Likelihoods: exact against slow code, the same in any chunks or batch; the bound against sums
over all masks."""

import itertools
import math

import pytest
import torch

from tiny_models import tiny_model
from twotower.lab.evaluate import likelihood
from twotower.lab.evaluate.likelihood import bound_text, draw_masks, score_texts
from twotower.model.two_tower import TwoTower


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return tiny_model()


def random_ids(model: TwoTower, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.vocab_size, (length,), generator=generator).tolist()


def slow_score(model: TwoTower, prompt: list[int], text: list[int]) -> float:
    """One token at a time, each by a fresh pass over everything before it."""
    total = 0.0
    for place, token in enumerate(text):
        ids = torch.tensor([[*prompt, *text[:place]]])
        total += float(model.context_logits(ids)[0, -1].double().log_softmax(-1)[token])
    return total


def test_scores_are_exact_in_any_batch_and_chunk(
    model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: a shift by one, padding that is scored, a chunk that forgets its past."""
    pairs = [(random_ids(model, p, p), random_ids(model, t, 9 + t)) for p, t in
             ((1, 7), (6, 1), (3, 12))]  # fmt: skip
    expected = [slow_score(model, prompt, text) for prompt, text in pairs]
    for chunk in (1, 4, 256):
        monkeypatch.setattr(likelihood, "CHUNK", chunk)
        together = score_texts(model, [p for p, _ in pairs], [t for _, t in pairs])
        assert [s.log_likelihood for s in together] == pytest.approx(expected, abs=1e-4)
        assert [s.num_tokens for s in together] == [7, 1, 12]
        alone = [score_texts(model, [p], [t])[0].log_likelihood for p, t in pairs]
        assert alone == pytest.approx(expected, abs=1e-4)


def test_greedy_text_is_told_from_other_text(model: TwoTower) -> None:
    prompt = random_ids(model, 4, 1)
    text: list[int] = []
    for _ in range(5):
        text.append(int(model.context_logits(torch.tensor([[*prompt, *text]]))[0, -1].argmax()))
    assert score_texts(model, [prompt], [text])[0].is_greedy
    changed = [*text[:-1], (text[-1] + 1) % model.config.vocab_size]
    assert not score_texts(model, [prompt], [changed])[0].is_greedy


@torch.no_grad()
def exact_bound(model: TwoTower, prompt: list[int], text: list[int], size: int) -> float:
    """The bound's expectation: every set of masked positions of every block, weighted."""
    total = 0.0
    for start in range(0, len(text), size):
        block = torch.tensor(text[start : start + size])
        length = len(block)
        view = model.prefill(torch.tensor([[*prompt, *text[:start]]])).view()
        for count in range(1, length + 1):
            sets = list(itertools.combinations(range(length), count))
            for masked in sets:
                noisy = block.clone()
                noisy[list(masked)] = model.config.mask_token_id
                t = torch.tensor([count / length])
                scores = model.denoise(noisy[None], view, t)[0].double().log_softmax(-1)
                loss = -sum(float(scores[i, block[i]]) for i in masked)
                total += loss * (length / count) / len(sets) / length
    return total


def test_the_bound_is_unbiased_and_its_error_is_honest(model: TwoTower) -> None:
    """Silent failure: a wrong weight, which changes every published bound by a factor."""
    prompt, text = random_ids(model, 3, 2), random_ids(model, 7, 3)
    expected = exact_bound(model, prompt, text, model.config.block_size)
    few, many = (
        bound_text(model, prompt, text, n, torch.Generator().manual_seed(n)) for n in (100, 1600)
    )
    for bound in (few, many):
        assert abs(bound.nats - expected) < 4 * bound.standard_error
    assert many.standard_error < expected / 20
    assert few.standard_error / many.standard_error == pytest.approx(4.0, rel=0.5)


def test_a_block_of_one_token_is_exact(model: TwoTower) -> None:
    """One token, always masked: the bound is its cross-entropy, without noise."""
    prompt, text = random_ids(model, 5, 4), random_ids(model, 1, 5)
    bound = bound_text(model, prompt, text, 2, torch.Generator().manual_seed(0))
    assert bound.standard_error == pytest.approx(0.0, abs=1e-6)
    assert bound.nats == pytest.approx(exact_bound(model, prompt, text, 16), rel=1e-5)


def test_masks_have_uniform_sizes_and_positions() -> None:
    is_masked, weight = draw_masks(8000, 4, torch.Generator().manual_seed(0))
    sizes = is_masked.sum(1)
    assert torch.equal(weight, 4 / sizes.double())
    for size in range(1, 5):
        share = float((sizes == size).double().mean())
        assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 8000)
    assert is_masked.double().mean(0).tolist() == pytest.approx([0.625] * 4, abs=0.03)


def test_empty_parts_are_refused(model: TwoTower) -> None:
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        score_texts(model, [[]], [[5]])
    with pytest.raises(ValueError, match="at least"):
        bound_text(model, [5], [], 4, torch.Generator())
