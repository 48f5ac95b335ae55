"""What a forbidden token leaves to those that it begins with."""

import math

import pytest
import torch

from twotower.engine.grammar_prefixes import TokenPrefixes
from twotower.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(['"a", "b", "c"'] * 20, 280)


def test_the_longest_allowed_beginning_gets_all_of_it(tokenizer: Tokenizer) -> None:
    """Guards a text in quotes: a model that closes it with `",` must not be made to go on in it."""
    (quote,), (pair,) = tokenizer.encode('"'), tokenizer.encode('",')
    assert tokenizer.token_bytes(pair) == b'",'
    probs = torch.full((tokenizer.vocab_size,), 1e-9)
    other = tokenizer.encode("x")[0]
    probs[quote], probs[pair], probs[other] = 0.1, 0.6, 0.3
    allowed = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    prefixes, logits = TokenPrefixes(tokenizer), probs.log()
    assert prefixes.pass_on(logits, allowed) is logits
    allowed[pair] = False
    found = prefixes.pass_on(logits, allowed)
    assert found[quote].item() == pytest.approx(math.log(0.7), abs=1e-5)
    is_other = torch.arange(len(found)) != quote
    assert torch.equal(found[is_other], logits[is_other])
    allowed[quote] = False  # nothing that it begins with is left
    assert torch.equal(prefixes.pass_on(logits, allowed), logits)


def test_the_end_of_a_value_is_an_end(tokenizer: Tokenizer) -> None:
    """Guards a last number: a model that goes on with a comma must not be made to add a digit."""
    (comma,), (close,), (digit,) = (tokenizer.encode(text) for text in (",", "}", "7"))
    probs = torch.full((tokenizer.vocab_size,), 1e-9)
    probs[comma], probs[close], probs[digit] = 0.9, 0.02, 0.08
    allowed = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    allowed[[close, digit]] = True
    prefixes, logits = TokenPrefixes(tokenizer), probs.log()
    assert torch.equal(prefixes.pass_on(logits, allowed), logits), "not JSON"
    found = prefixes.pass_on(logits, allowed, is_json=True)
    assert found[close].item() == pytest.approx(math.log(0.92), abs=1e-5)
    assert found[digit] == logits[digit]


def test_what_no_float_can_hold_is_left_alone(tokenizer: Tokenizer) -> None:
    """Guards against -inf for all that is allowed, where a model is sure of something else."""
    logits = torch.zeros(tokenizer.vocab_size)
    (quote,), (pair,) = tokenizer.encode('"'), tokenizer.encode('",')
    logits[pair] = 1e4
    allowed = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    allowed[tokenizer.encode("x")] = True
    assert torch.equal(TokenPrefixes(tokenizer).pass_on(logits, allowed), logits)
    allowed[quote] = True
    assert TokenPrefixes(tokenizer).pass_on(logits, allowed)[quote].item() == 1e4
