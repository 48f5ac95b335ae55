"""Options: every bad value is one line, and what is given wins over the checkpoint's defaults."""

import copy
import dataclasses
import math

import pytest

from tiny_models import tiny_model
from twotower import GenerateOptions, generate
from twotower.documented import field_docs
from twotower.engine import MODES, EngineOptions, ResolvedOptions, defaults_of, resolve_options
from twotower.engine.batch import Batch
from twotower.engine.blocks import BLOCKS
from twotower.engine.resolved import FIELD_MODES
from twotower.engine.row import Row


def test_defaults_of_the_issue() -> None:
    o = resolve_options(GenerateOptions(), {})
    assert o == ResolvedOptions()
    assert (o.mode, o.block_size, o.steps_per_block, o.confidence_threshold) == (
        "diffusion", 16, 16, 0.8,
    )  # fmt: skip
    assert (o.temperature, o.top_k, o.top_p, o.seed) == (0.0, 0, 1.0, 0)
    assert (o.eos_token_id, o.stop) == ((), ())


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("mode", "fast", "diffusion, speculative, posterior, predict-and-noise, ar, mock-ar"),
        ("schedule", "quadratic", "linear, cosine, exponential"),
        ("remask", "best", "confidence, margin, random"),
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 2.5, "whole number"),
        ("max_new_tokens", "5", "whole number"),
        ("max_new_tokens", True, "whole number"),
        ("block_size", 0, "at least 1"),
        ("block_size", -3, "at least 1"),
        ("steps_per_block", 0, "between 1 and 1024"),
        ("steps_per_block", 100_000, "between 1 and 1024"),
        ("draft_passes", 10**9, "between 1 and 1024"),
        ("confidence_threshold", 1.5, "between 0 and 1"),
        ("confidence_threshold", -0.1, "between 0 and 1"),
        ("confidence_threshold", math.nan, "between 0 and 1"),
        ("verify_threshold", 1.5, "between 0 and 1"),
        ("temperature", -1.0, "at least 0"),
        ("temperature", math.inf, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", "hot", "must be a number"),
        ("top_k", -1, "at least 0"),
        ("top_k", 1.5, "whole number"),
        ("top_p", 0.0, "between 1e-06 and 1"),
        ("top_p", 1e-300, "between 1e-06 and 1"),
        ("top_p", 1.1, "between 1e-06 and 1"),
        ("min_p", 1.1, "between 0 and 1"),
        ("presence_penalty", 2.1, "between -2.0 and 2.0"),
        ("frequency_penalty", math.nan, "between -2.0 and 2.0"),
        ("repetition_penalty", 0.0, "between 0.01 and 100.0"),
        ("logit_bias", {"x": 1.0}, "token ids to numbers between -100 and 100"),
        ("logit_bias", {5: 101.0}, "token ids to numbers between -100 and 100"),
        ("logit_bias", {5: "1"}, "token ids to numbers between -100 and 100"),
        ("logit_bias", [5, 1.0], "token ids to numbers between -100 and 100"),
        ("logit_bias", dict.fromkeys(range(1025), 1.0), "at most 1024 tokens"),
        ("seed", -1, "at least 0"),
        ("seed", 2**64, "at most"),
        ("eos_token_id", "end", "a token id"),
        ("eos_token_id", 1.0, "a token id"),
        ("eos_token_id", -1, "a token id"),
        ("eos_token_id", (2, "x"), "a token id"),
        ("ignore_eos", 1, "true or false"),
        ("stop", 5, "must be text"),
        ("stop", ("a", ""), "empty string"),
        ("adaptive", 1, "true or false"),
        ("logprobs", -1, "between 0 and 100"),
        ("logprobs", 101, "between 0 and 100"),
        ("logprobs", True, "whole number"),
        ("grammar", "a+", "must be a Grammar"),
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


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("batch_size", 0, "at least 1"),
        ("batch_size", "4", "whole number"),
        ("batch_size", None, "whole number"),
        ("max_waiting", 0, "at least 1"),
        ("overlap", "both", "use one of auto, on, off"),
        ("prefix_cache_bytes", -1, "at least 0"),
        ("lookup_cache_bytes", -1, "at least 0"),
    ],
)
def test_bad_values_of_the_engine(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        EngineOptions(**{field: value})  # type: ignore[arg-type]


def test_overlap_needs_a_row_that_uses_the_denoiser() -> None:
    """Silent failure: two threads are asked for, and one tower works alone."""
    ar = GenerateOptions(mode="ar", max_new_tokens=2)
    lookup = GenerateOptions(mode="speculative", drafts="lookup", max_new_tokens=2)
    engine = EngineOptions(overlap="on")
    for options in ([ar], [lookup, ar]):
        with pytest.raises(ValueError, match="overlap: has no effect in mode ar, or with drafts="):
            generate(tiny_model(), [[5]] * len(options), options, engine=engine)
    drafted = GenerateOptions(mode="speculative", max_new_tokens=2)
    assert len(generate(tiny_model(), [[5], [6]], [ar, drafted], engine=engine)) == 2
    assert generate(tiny_model(), [], engine=engine) == []


USEFUL: dict[str, object] = {
    "block_size": 4,
    "steps_per_block": 4,
    "first_token": "context",
    "verify_threshold": 0.0,
    "drafts": "lookup",
    "draft_passes": 2,
    "confidence_threshold": 0.7,
    "schedule": "cosine",
    "remask": "margin",
    "adaptive": True,
    "logprobs": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": ((5, 1.0),),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", sorted(USEFUL))
def test_a_field_without_effect_in_the_mode_is_refused(field: str, mode: str) -> None:
    """Guards against an option that somebody tunes and that nothing reads; also where the mode is
    the checkpoint's."""
    own = GenerateOptions(**{field: USEFUL[field]})  # type: ignore[arg-type]
    if mode in FIELD_MODES[field]:
        GenerateOptions(mode=mode, **{field: USEFUL[field]})  # type: ignore[arg-type]
        assert getattr(resolve_options(own, {"mode": mode}), field) == USEFUL[field]
        return
    told = f"^{field}: has no effect in mode {mode}; leave it out, or use mode "
    with pytest.raises(ValueError, match=told):
        GenerateOptions(mode=mode, **{field: USEFUL[field]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=told):
        resolve_options(own, {"mode": mode})


def test_every_mode_names_the_fields_that_it_alone_has() -> None:
    """Guards the table against a new field that is forgotten in it: what is not in it must count in
    every mode."""
    names = {field.name for field in dataclasses.fields(GenerateOptions)}
    common = {
        "mode", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "eos_token_id",
        "ignore_eos", "stop",
    }  # fmt: skip
    assert names - set(FIELD_MODES) == common and set(FIELD_MODES) == {*USEFUL, "grammar"}
    assert names == {field.name for field in dataclasses.fields(ResolvedOptions)}


@pytest.mark.parametrize(("field", "value"), [("top_k", 5), ("top_p", 0.9), ("min_p", 0.1)])
def test_greedy_decoding_refuses_what_only_sampling_uses(field: str, value: float) -> None:
    own = GenerateOptions(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{field}={value}: has no effect at temperature 0"):
        resolve_options(own, {})
    assert getattr(resolve_options(own, {"temperature": 0.5}), field) == value
    off = GenerateOptions(top_k=0, top_p=1.0)
    assert resolve_options(off, {"top_k": 5, "temperature": 0.5}).top_k == 0
    # A checkpoint's own are passed over where somebody asks for temperature 0.
    resolve_options(GenerateOptions(temperature=0.0), {field: value, "temperature": 0.5})


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateOptions().seed = 1  # type: ignore[misc]


def test_only_what_is_given_is_shown() -> None:
    assert repr(GenerateOptions(mode="ar", seed=0)) == "GenerateOptions(mode='ar', seed=0)"


def test_help_explains_every_field() -> None:
    """Guards `help(twotower.GenerateOptions)`, and flags whose help is their field's docstring."""
    for options_class in (GenerateOptions, EngineOptions):
        assert options_class.__doc__ is not None
        for field in dataclasses.fields(options_class):
            assert f"\n{field.name}: {field_docs(options_class)[field.name][:40]}"[
                :60
            ] in options_class.__doc__.replace("\n    ", " ")


def test_lists_become_tuples() -> None:
    o = GenerateOptions(stop=["a", "b"], eos_token_id=[1, 2])  # type: ignore[arg-type]
    assert (o.stop, o.eos_token_id) == (("a", "b"), (1, 2))
    assert resolve_options(GenerateOptions(stop="a"), {}).stop == ("a",)
    assert resolve_options(GenerateOptions(eos_token_id=3), {}).eos_token_id == (3,)


DEFAULTS = {
    "temperature": 0.7,
    "block_size": 8,
    "eos_token_id": [2, 5],
    "_from_model_config": True,
    "top_k": None,
}


def test_a_given_option_wins_over_the_checkpoints() -> None:
    """Guards precedence, also for a given value that equals our own default."""
    o = resolve_options(GenerateOptions(temperature=0.0, seed=9), DEFAULTS)
    assert (o.temperature, o.seed) == (0.0, 9)
    assert (o.block_size, o.eos_token_id) == (8, (2, 5))
    assert o.steps_per_block == 16, "named by nobody"
    assert resolve_options(GenerateOptions(), DEFAULTS).temperature == 0.7
    assert resolve_options(GenerateOptions(), {"pad_token_id": 0}) == ResolvedOptions()
    assert resolve_options(GenerateOptions(ignore_eos=True), DEFAULTS).eos_token_id == ()
    assert resolve_options(GenerateOptions(eos_token_id=7), DEFAULTS).eos_token_id == (7,)


def test_published_decoding_is_one_option_away() -> None:
    """Guards a checkpoint that asks for verification: first_token="denoiser" alone is as
    published."""
    defaults = {"first_token": "context", "verify_threshold": 0.1}
    assert resolve_options(GenerateOptions(), defaults).verify_threshold == 0.1
    for given in ({"first_token": "denoiser"}, {"verify_threshold": 0.0}):
        assert resolve_options(GenerateOptions(**given), defaults).verify_threshold == 0  # type: ignore[arg-type]


def test_copies_remember_what_was_given() -> None:
    for o in (
        copy.copy(GenerateOptions(temperature=0.0)),
        dataclasses.replace(GenerateOptions(), temperature=0.0),
    ):
        assert resolve_options(o, DEFAULTS).temperature == 0.0
        assert resolve_options(o, DEFAULTS).block_size == 8


def test_a_checkpoint_that_samples_has_a_temperature_of_1() -> None:
    """Silent failure: do_sample and top_p without a temperature meant greedy texts, where
    transformers samples, from 50 tokens where the file does not say otherwise.
    """
    nucleus = {"do_sample": True, "top_p": 0.8}
    assert resolve_options(GenerateOptions(), nucleus).temperature == 1
    assert resolve_options(GenerateOptions(temperature=0), nucleus).temperature == 0
    assert resolve_options(GenerateOptions(), nucleus | {"temperature": 0.6}).temperature == 0.6
    assert resolve_options(GenerateOptions(), nucleus).top_k == 50
    assert resolve_options(GenerateOptions(), nucleus | {"top_k": 0}).top_k == 0
    assert resolve_options(GenerateOptions(top_k=3), nucleus).top_k == 3


def test_defaults_that_do_not_sample() -> None:
    """A generation_config.json with do_sample=false holds a temperature that means nothing, and so
    does one of transformers without do_sample.
    """
    for others in ({"do_sample": False}, {"transformers_version": "4.31.0"}):
        found = resolve_options(GenerateOptions(), {"temperature": 0.7, **others})
        assert found.temperature == 0.0
    assert resolve_options(GenerateOptions(), {"temperature": 0.7}).temperature == 0.7


def test_defaults_of_other_modes_are_passed_over() -> None:
    """Guards one file of defaults for all modes: those of a mode count in it alone."""
    defaults = {"mode": "speculative", "verify_threshold": 0.1, "first_token": "context"}
    assert resolve_options(GenerateOptions(), defaults).verify_threshold == 0.0
    assert resolve_options(GenerateOptions(mode="diffusion"), defaults).verify_threshold == 0.1


def test_a_bad_default_names_the_file() -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: block_size=0") as error:
        resolve_options(GenerateOptions(), {"block_size": 0})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("diffusion", "confidence"),
        ("speculative", "confidence"),
        ("posterior", "posterior"),
        ("predict-and-noise", "predict-and-noise"),
    ],
)
def test_options_reach_the_sampler(mode: str, kind: str) -> None:
    """Guards options that are accepted and dropped on the way to the sampler."""
    model = tiny_model()
    options = dataclasses.replace(
        resolve_options(GenerateOptions(mode=mode), defaults_of(model)),  # type: ignore[arg-type]
        steps_per_block=5,
        draft_passes=3,
        confidence_threshold=0.4,
        temperature=0.6,
        top_k=7,
        top_p=0.9,
        schedule="cosine",
        remask="margin",
        adaptive=True,
    )
    rows = [Row(0, [5], options), Row(1, [5], dataclasses.replace(options, temperature=0.0))]
    s = Batch(model, BLOCKS, rows, model.empty_cache(2)).sampler
    steps = 3 if mode == "speculative" else 5
    assert (s.kind, s.steps.tolist()) == (kind, [steps, steps])
    assert s.threshold.tolist() == pytest.approx([0.4, 0.4])
    assert s.temperature.tolist() == pytest.approx([0.6, 0.0])
    assert (s.top_k.tolist(), s.top_p.tolist()) == ([7, 7], pytest.approx([0.9, 0.9]))
    assert (s.schedule, s.remask, s.adaptive, s.mask_token_id) == ("cosine", "margin", True, 3)


def test_verification_needs_the_context_tower_s_first_token_from_somebody() -> None:
    """Silent failure: the option alone is refused for a checkpoint that brings what it needs, so
    that no command which lacks first_token can use it.
    """
    alone = GenerateOptions(mode="diffusion", verify_threshold=0.5)
    found = resolve_options(alone, {"first_token": "context", "verify_threshold": 0.1})
    assert found.verify_threshold == 0.5
    for defaults in ({}, {"max_new_tokens": 5}, {"first_token": "denoiser"}):
        with pytest.raises(ValueError, match=r"^verify_threshold=0\.5 needs first_token='context'"):
            resolve_options(alone, defaults)
    both = GenerateOptions(first_token="denoiser", verify_threshold=0.1)
    with pytest.raises(ValueError, match="first_token='context'"):
        resolve_options(both, {})
    with pytest.raises(ValueError, match=r"generation_config.json.*first_token='context'"):
        resolve_options(GenerateOptions(), {"verify_threshold": 0.1})
