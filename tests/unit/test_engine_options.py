"""Options: every bad value is one line, and what is given wins over the checkpoint's defaults."""

import copy
import dataclasses
import math

import pytest

from twotower import GenerateOptions
from twotower.engine import MODES


def test_defaults_of_the_issue() -> None:
    o = GenerateOptions()
    assert (o.mode, o.block_size, o.steps_per_block, o.confidence_threshold) == (
        "diffusion", 16, 16, 0.8,
    )  # fmt: skip
    assert (o.temperature, o.top_k, o.top_p, o.seed) == (0.0, None, None, 0)
    assert (o.eos_token_id, o.stop) == ("config", None)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("mode", "fast", "diffusion, speculative, posterior, predict-and-noise, ar, mock-ar"),
        ("schedule", "quadratic", "linear, cosine, exponential"),
        ("remask", "best", "confidence, margin, random"),
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 2.5, "int"),
        ("max_new_tokens", True, "int"),
        ("block_size", 0, "at least 1"),
        ("block_size", -3, "at least 1"),
        ("steps_per_block", 0, "at least 1"),
        ("confidence_threshold", 1.5, "between 0.0 and 1.0"),
        ("confidence_threshold", -0.1, "between 0.0 and 1.0"),
        ("confidence_threshold", math.nan, "between 0.0 and 1.0"),
        ("review_threshold", 1.5, "between 0.0 and 1.0"),
        ("temperature", -1.0, "at least 0"),
        ("temperature", math.inf, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", "hot", "int or float"),
        ("top_k", 0, "at least 1"),
        ("top_k", 1.5, "int or None"),
        ("top_p", 0.0, "between 1e-06 and 1"),
        ("top_p", 1e-300, "between 1e-06 and 1"),
        ("top_p", 1.1, "between 1e-06 and 1"),
        ("seed", -1, "between 0"),
        ("seed", 2**64, "between 0"),
        ("eos_token_id", "end", "token id, 'config' or None"),
        ("eos_token_id", 1.0, "int or tuple"),
        ("stop", 5, "str or tuple or None"),
        ("stop", ("a", ""), "empty string"),
        ("adaptive", 1, "bool"),
        ("logprobs", -1, "between 0 and 100"),
        ("logprobs", 101, "between 0 and 100"),
        ("logprobs", True, "int or None"),
        ("grammar", "a+", "Grammar or None"),
    ],
)
def test_bad_values(field: str, value: object, allowed: str) -> None:
    """Guards against options that are accepted and ignored, or crash in mid-text."""
    with pytest.raises(ValueError) as error:
        GenerateOptions(**{field: value})  # type: ignore[arg-type]
    message = str(error.value)
    assert field in message
    assert allowed in message
    assert "\n" not in message


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateOptions().seed = 1  # type: ignore[misc]


def test_lists_become_tuples() -> None:
    o = GenerateOptions(stop=["a", "b"], eos_token_id=[1, 2])  # type: ignore[arg-type]
    assert (o.stop, o.eos_token_id) == (("a", "b"), (1, 2))
    assert GenerateOptions(stop="a").stop_strings == ("a",)
    assert GenerateOptions().stop_strings == ()


DEFAULTS = {
    "temperature": 0.7,
    "block_size": 8,
    "eos_token_id": [2, 5],
    "transformers_version": "5.0",
    "top_k": None,
}


def test_a_given_option_wins_over_the_checkpoints() -> None:
    """Guards precedence, also for a given value that equals our own default."""
    o = GenerateOptions(temperature=0.0, seed=9).with_defaults(DEFAULTS)
    assert (o.temperature, o.seed) == (0.0, 9)
    assert (o.block_size, o.eos_token_id) == (8, (2, 5))
    assert o.steps_per_block == 16, "named by nobody"
    assert GenerateOptions().with_defaults(DEFAULTS).temperature == 0.7
    same = GenerateOptions()
    assert same.with_defaults({"pad_token_id": 0}) == same


def test_published_decoding_is_one_option_away() -> None:
    """Guards a checkpoint that asks for reviews: first_token="denoiser" alone is as published."""
    defaults = {"first_token": "context", "review_threshold": 0.1}
    assert GenerateOptions().with_defaults(defaults).is_reviewed
    assert not GenerateOptions(first_token="denoiser").with_defaults(defaults).is_reviewed
    assert not GenerateOptions(review_threshold=0.0).with_defaults(defaults).is_reviewed


def test_copies_remember_what_was_given() -> None:
    o = copy.copy(GenerateOptions(temperature=0.0))
    assert o.with_defaults(DEFAULTS).temperature == 0.0
    assert o.with_defaults(DEFAULTS).block_size == 8


def test_defaults_that_do_not_sample() -> None:
    """A generation_config.json with do_sample=false holds a temperature that means nothing."""
    found = GenerateOptions().with_defaults({"temperature": 0.7, "do_sample": False})
    assert found.temperature == 0.0


def test_a_bad_default_names_the_file() -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: block_size=0") as error:
        GenerateOptions().with_defaults({"block_size": 0})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("diffusion", "confidence"),
        ("posterior", "posterior"),
        ("predict-and-noise", "predict-and-noise"),
    ],
)
def test_block_sampler(mode: str, kind: str) -> None:
    """Guards options that are accepted and dropped on the way to the sampler."""
    o = GenerateOptions(
        mode=mode,  # type: ignore[arg-type]
        steps_per_block=5,
        confidence_threshold=0.4,
        temperature=0.6,
        top_k=7,
        top_p=0.9,
        schedule="cosine",
        remask="margin",
        adaptive=True,
    )
    s = o.block_sampler(11)
    assert (s.kind, s.steps, s.confidence_threshold) == (kind, 5, 0.4)
    assert (s.temperature, s.top_k, s.top_p) == (0.6, 7, 0.9)
    assert (s.schedule, s.remask, s.adaptive, s.mask_token_id) == ("cosine", "margin", True, 11)
    off = GenerateOptions().block_sampler(3)
    assert (off.top_k, off.top_p) == (0, 1.0)


def test_block_modes() -> None:
    found = [GenerateOptions(mode=mode).is_block_mode for mode in MODES]
    assert found == [True, True, True, True, False, False]


def test_a_review_needs_the_context_tower_s_first_token_from_somebody() -> None:
    """Silent failure: the option alone is refused for a checkpoint that brings what it needs, so
    that no command which lacks first_token can use it.
    """
    alone = GenerateOptions(mode="diffusion", review_threshold=0.5)
    found = alone.with_defaults({"first_token": "context", "review_threshold": 0.1})
    assert found.is_reviewed and found.review_threshold == 0.5
    for defaults in ({}, {"max_new_tokens": 5}):
        with pytest.raises(ValueError, match=r"^review_threshold=0\.5 needs first_token='context'"):
            alone.with_defaults(defaults)
    with pytest.raises(ValueError, match="first_token='context'"):
        alone.with_defaults({"first_token": "denoiser"})
    with pytest.raises(ValueError, match="first_token='context'"):
        GenerateOptions(first_token="denoiser", review_threshold=0.1)
    with pytest.raises(ValueError, match=r"generation_config.json.*first_token='context'"):
        GenerateOptions().with_defaults({"review_threshold": 0.1})
