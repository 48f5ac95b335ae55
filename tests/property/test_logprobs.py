"""Log-probabilities of what is written: the context tower's, in every mode that can tell them."""

import math
from itertools import pairwise

import pytest
import torch

from tiny_models import prompts_of, tiny_model
from tiny_options import options_of
from tiny_text import byte_tokenizer
from twotower import Completion, GenerateOptions, TokensCommitted, generate, stream
from twotower.engine import Finished
from twotower.engine.grammar import regex
from twotower.lab.evaluate.likelihood import score_texts

MODEL = tiny_model()
PROMPTS = prompts_of([1, 7, 2, 19, 4])
MODES = ("ar", "speculative", "diffusion", "posterior", "predict-and-noise")
# float32 passes of other lengths: the sums differ in their last bits
CLOSE = {"abs": 1e-4}


def options(mode: str, logprobs: int | None, **changes: object) -> GenerateOptions:
    values = {"mode": mode, "logprobs": logprobs} | changes
    return options_of({"max_new_tokens": 10}, values)


def check(prompt: list[int], found: Completion, num_top: int) -> None:
    """Each value against a pass over the whole text, one token at a time."""
    assert found.logprobs is not None
    assert [one.token for one in found.logprobs] == found.tokens
    with torch.no_grad():
        logits = MODEL.context_logits(torch.tensor([prompt + found.tokens]))[0]
    expected = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    for one, row in zip(found.logprobs, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), **CLOSE)
        assert [token for token, _ in one.top] == row.topk(num_top).indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(
            row.topk(num_top).values.tolist(), **CLOSE
        )
        assert all(a >= b for a, b in pairwise(value for _, value in one.top))


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("mode", MODES)
def test_logprobs_are_those_of_the_text(mode: str, temperature: float) -> None:
    """Guards a shift by one, values after temperature or top_p, the last block of a row, which
    decoding alone need not read, and a cut block."""
    shape = {"temperature": temperature, "top_p": 0.8, "top_k": 5, "seed": 3}
    rows = generate(MODEL, PROMPTS, options(mode, 3, **shape))
    scores = score_texts(MODEL, PROMPTS, [row.tokens for row in rows])
    for prompt, row, score in zip(PROMPTS, rows, scores, strict=True):
        check(prompt, row, 3)
        assert row.logprobs is not None
        total = math.fsum(one.logprob for one in row.logprobs)
        assert total == pytest.approx(score.log_likelihood, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_asking_changes_nothing_else(mode: str) -> None:
    """Guards text and counts of the row that asks, and of its neighbours, which do not."""
    plain = generate(MODEL, PROMPTS, options(mode, None))
    asked = [options(mode, 0 if i % 2 else None) for i in range(len(PROMPTS))]
    mixed = generate(MODEL, PROMPTS, asked)
    is_block_mode = mode in ("diffusion", "posterior", "predict-and-noise")
    for i, (one, other) in enumerate(zip(plain, mixed, strict=True)):
        assert other.tokens == one.tokens
        assert (other.nfe, other.finish_reason) == (one.nfe, one.finish_reason)
        # the last block is read only where its probabilities are wanted
        more = int(i % 2 == 1 and is_block_mode)
        assert other.context_forwards == one.context_forwards + more
        if i % 2:
            check(PROMPTS[i], other, 0)
        else:
            assert other.logprobs is None


@pytest.mark.parametrize("mode", MODES)
def test_each_commit_has_its_own(mode: str) -> None:
    events = list(stream(MODEL, [PROMPTS[3]], options(mode, 2)))
    commits = [event for event in events if isinstance(event, TokensCommitted)]
    for event in commits:
        assert event.logprobs is not None
        assert [one.token for one in event.logprobs] == event.tokens
    (done,) = [event.completion for event in events if isinstance(event, Finished)]
    assert done.logprobs == tuple(one for event in commits for one in event.logprobs or ())


@pytest.mark.parametrize("mode", ["ar", "speculative", "diffusion"])
def test_what_follows_the_end_has_none(mode: str) -> None:
    """Guards the alignment of tokens and values where EOS cuts what was committed."""
    text = generate(MODEL, [PROMPTS[0]], options(mode, None))[0].tokens
    found = generate(MODEL, [PROMPTS[0]], options(mode, 1, eos_token_id=text[5]))[0]
    assert found.finish_reason == "eos"
    check(PROMPTS[0], found, 1)


def test_more_alternatives_than_tokens() -> None:
    found = generate(MODEL, [PROMPTS[1]], options("ar", 100, max_new_tokens=2))[0]
    assert found.logprobs is not None
    assert all(len(one.top) == 41 for one in found.logprobs)
    assert math.fsum(math.exp(value) for _, value in found.logprobs[0].top) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_a_grammar_changes_no_probability(mode: str) -> None:
    """Guards what the numbers mean: how probable the model finds its text, not how probable it is
    among what a grammar leaves (there, a forced token has probability 1)."""
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    o = options(mode, 0, grammar=regex("[ab]{5}"), eos_token_id=2)
    (found,) = generate(model, [PROMPTS[1]], o, tokenizer)
    (score,) = score_texts(model, [PROMPTS[1]], [found.tokens])
    assert found.logprobs is not None
    total = math.fsum(one.logprob for one in found.logprobs)
    assert total == pytest.approx(score.log_likelihood, **CLOSE)


def test_mock_ar_refuses_them() -> None:
    with pytest.raises(ValueError, match="logprobs: has no effect in mode mock-ar"):
        generate(MODEL, PROMPTS, options("mock-ar", 0))
