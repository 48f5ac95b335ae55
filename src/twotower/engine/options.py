"""What a request may ask of decoding and how an engine runs, checked here and nowhere else.

A field that is not given takes the checkpoint's default, and without one the library's:
`resolve_options` decides it once, and refuses what the chosen mode does not use.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from twotower.arguments import (
    A_SWITCH,
    COUNT,
    INDEX,
    SHARE,
    Problem,
    check,
    check_fields,
    either,
    instance,
    number,
    one_of,
    strings,
    token_ids,
)
from twotower.diffusion import SCHEDULES, Remask, Schedule
from twotower.documented import public_options
from twotower.engine.biases import LogitBias, as_pairs, biases
from twotower.engine.drafts import Drafts
from twotower.engine.grammar import Grammar

Mode = Literal["diffusion", "speculative", "posterior", "predict-and-noise", "ar", "mock-ar"]
Overlap = Literal["auto", "on", "off"]
FirstToken = Literal["denoiser", "context"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_LOGPROBS = 100  # alternatives to each token
MAX_PASSES = 1024  # of a block or draft; more than its tokens change nothing but `posterior`
MIN_TOP_P = 1e-6  # float32 must tell it from 0
MODES_OF_BACKBONES: tuple[Mode, ...] = ("speculative", "ar")  # which need no denoiser
BLOCK_MODES: tuple[Mode, ...] = ("diffusion", "posterior", "predict-and-noise")
_IN_ORDER: tuple[Mode, ...] = ("speculative", "ar", "mock-ar")
_penalty = number(-2.0, 2.0)
_passes = number(1, MAX_PASSES, is_whole=True)
_ENGINE_CHECKS: dict[str, Problem] = {
    "batch_size": COUNT,
    "max_waiting": COUNT,
    "overlap": one_of(*get_args(Overlap)),
    "prefix_cache_bytes": INDEX,
}
# Fields that need a temperature above 0, with the values that are off.
SAMPLED_ONLY: Mapping[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@public_options
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How requests share the machine. None of these options changes a text."""

    batch_size: int = 16
    """Maximum number of sequences decoded at the same time; others wait."""
    max_waiting: int = 256
    """Server: maximum number of prompts that wait; further ones are refused."""
    overlap: Overlap = "auto"
    """Run both towers at the same time, each on another half of the batch: the denoiser drafts for
    one half while the context tower verifies the other. auto: on if the towers are on two
    devices."""
    prefix_cache_bytes: int = 0
    """Size of the prefix cache: of a prompt that begins like an earlier text only the rest is
    prefilled. 0 is off."""

    def __post_init__(self) -> None:
        check_fields(self, _ENGINE_CHECKS)


@dataclass(frozen=True, kw_only=True, repr=False)
class GenerateOptions:
    """How to decode one prompt.

    A field that is None (not given) takes the checkpoint's default from generation_config.json, and
    without one the library's.
    """

    mode: Mode | None = None
    """Decoding algorithm. ar: the context tower alone, token by token. speculative: the same text,
    from drafts that the context tower verifies. diffusion: the denoiser fills blocks of mask tokens
    and commits confident predictions after each pass. posterior, predict-and-noise: other samplers
    of a block. mock-ar: the denoiser alone, token by token."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens."""
    block_size: int | None = None
    """Tokens per block or draft. In diffusion, more than the model was trained with ruin the
    text."""
    steps_per_block: int | None = None
    """diffusion, posterior, predict-and-noise: maximum number of denoiser passes per block."""
    first_token: FirstToken | None = None
    """diffusion: which tower predicts the first token of a block. denoiser: as published. context:
    at no extra forward pass."""
    verify_threshold: float | None = None
    """diffusion: verify each block with the context tower. The first token whose probability is
    below this threshold is rejected with all that follow it, and the next block starts there with
    the context tower's own token, at no extra forward pass. 0 accepts all, as published. Needs
    first_token=context."""
    drafts: Drafts | None = None
    """speculative: where drafts come from. lookup: prompt lookup (n-gram matching), which copies
    what followed the last tokens where they occurred before, and n-grams of the model's answers
    where its denoiser brings some. denoiser: the denoiser tower. auto: in each cycle the one that
    is expected to save more time."""
    draft_passes: int | None = None
    """speculative: maximum number of denoiser passes per draft."""
    confidence_threshold: float | None = None
    """diffusion, speculative: a pass commits all predictions that are more probable than this, and
    at least one."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy."""
    top_k: int | None = None
    """Sample from the k most probable tokens only; 0 is off."""
    top_p: float | None = None
    """Sample from the smallest set of most probable tokens with this total probability; 1 is
    off."""
    min_p: float | None = None
    """Sample from tokens that are at least this fraction as probable as the most probable one; 0 is
    off."""
    presence_penalty: float | None = None
    """ar, speculative, mock-ar: subtracted from the logits of tokens that the new text has; 0 is
    off."""
    frequency_penalty: float | None = None
    """ar, speculative, mock-ar: subtracted from a token's logit once for each time that the new
    text has it; 0 is off."""
    repetition_penalty: float | None = None
    """ar, speculative, mock-ar: logits of tokens that prompt or new text have are divided by this
    where positive and multiplied where negative; 1 is off."""
    logit_bias: Mapping[int, float] | LogitBias | None = None
    """ar, speculative, mock-ar: numbers from -100 to 100 that are added to logits, by token id."""
    seed: int | None = None
    """Seed of each prompt's own random numbers: its text does not depend on the rest of a batch."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Token ids that end the text instead of the checkpoint's."""
    ignore_eos: bool | None = None
    """Continue after end-of-text tokens, up to max_new_tokens."""
    stop: str | tuple[str, ...] | None = None
    """Strings that end the text and are not part of it. Needs a tokenizer."""
    logprobs: int | None = None
    """Return the context tower's log-probability of each token, and of this many most probable
    alternatives; 0 for the token alone."""
    grammar: Grammar | None = None
    """ar, speculative: grammar that the text must match. Made by json_schema, regex or lark of
    twotower.engine.grammar; needs a tokenizer."""
    schedule: Schedule | None = None
    """posterior, predict-and-noise: noise schedule, how the masked fraction falls from step to
    step."""
    remask: Remask | None = None
    """predict-and-noise: which predictions are masked again after a step: those with the lowest
    probability (confidence), with the smallest lead over the second choice (margin), or random
    ones."""
    adaptive: bool | None = None
    """predict-and-noise: ignore the schedule; commit one token a step at first, then equal numbers
    of tokens."""

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "stop"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", as_pairs(self.logit_bias))
        check_fields(self, _CHECKS)
        if self.mode is not None:
            _refuse_unused(self, self.mode)
        if self.ignore_eos and self.eos_token_id is not None:
            raise ValueError("eos_token_id: has no effect with ignore_eos; leave one of them out")

    def given(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name in _CHECKS if (value := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.given().items())
        return f"GenerateOptions({shown})"


def _option(default: Any, problem: Problem, modes: tuple[Mode, ...] = MODES) -> Any:
    """A field with its check, and the modes that use it: given in another one it is refused, in
    Python, on the command line and over HTTP alike.
    """
    return dataclasses.field(default=default, metadata={"problem": problem, "modes": modes})


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions:
    """`GenerateOptions` with a value for every field; made by `resolve_options`, valid."""

    mode: Mode = _option("diffusion", one_of(*MODES))
    max_new_tokens: int = _option(128, COUNT)
    block_size: int = _option(16, COUNT, (*BLOCK_MODES, "speculative"))
    steps_per_block: int = _option(16, _passes, BLOCK_MODES)
    first_token: FirstToken = _option("denoiser", one_of(*get_args(FirstToken)), ("diffusion",))
    verify_threshold: float = _option(0.0, SHARE, ("diffusion",))
    drafts: Drafts = _option("auto", one_of(*get_args(Drafts)), ("speculative",))
    draft_passes: int = _option(1, _passes, ("speculative",))
    confidence_threshold: float = _option(0.8, SHARE, ("diffusion", "speculative"))
    temperature: float = _option(0.0, number(0.0))
    top_k: int = _option(0, INDEX)
    top_p: float = _option(1.0, number(MIN_TOP_P, 1.0))
    min_p: float = _option(0.0, SHARE)
    # Of a text from left to right: a block is filled in any order, its tokens all at once.
    presence_penalty: float = _option(0.0, _penalty, _IN_ORDER)
    frequency_penalty: float = _option(0.0, _penalty, _IN_ORDER)
    repetition_penalty: float = _option(1.0, number(0.01, 100.0), _IN_ORDER)
    logit_bias: LogitBias = _option((), biases, _IN_ORDER)
    seed: int = _option(0, INDEX)
    eos_token_id: tuple[int, ...] = _option((), token_ids)
    ignore_eos: bool = _option(False, A_SWITCH)
    stop: tuple[str, ...] = _option((), strings)
    logprobs: int | None = _option(
        None, number(0, MAX_LOGPROBS, is_whole=True), (*BLOCK_MODES, "speculative", "ar")
    )
    grammar: Grammar | None = _option(None, instance(Grammar, "a Grammar"), ("speculative", "ar"))
    schedule: Schedule = _option("linear", one_of(*SCHEDULES), ("posterior", "predict-and-noise"))
    remask: Remask = _option("confidence", one_of(*get_args(Remask)), ("predict-and-noise",))
    adaptive: bool = _option(False, A_SWITCH, ("predict-and-noise",))

    @cached_property
    def has_penalties(self) -> bool:
        """Whether the logits depend on more than the model."""
        is_penalised = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return bool(is_penalised) or self.repetition_penalty != 1


_FIELDS = dataclasses.fields(ResolvedOptions)
public_options(GenerateOptions, {field.name: field.default for field in _FIELDS})
_CHECKS: Mapping[str, Problem] = {field.name: field.metadata["problem"] for field in _FIELDS}
# The modes of each field that only some use.
FIELD_MODES: Mapping[str, tuple[Mode, ...]] = {
    field.name: field.metadata["modes"] for field in _FIELDS if field.metadata["modes"] != MODES
}


def resolve_options(options: GenerateOptions, defaults: Mapping[str, object]) -> ResolvedOptions:
    """The options with a checkpoint's defaults, and the library's, for fields that are not given.

    Defaults that are no fields of ours, or that the mode does not use, are passed over. ValueError
    (one line) for a bad default, and for fields that have no effect together.
    """
    given, known = options.given(), _checked_defaults(defaults)
    mode: Mode = given.get("mode") or known.get("mode") or ResolvedOptions.mode
    _refuse_unused(options, mode)
    known = {name: value for name, value in known.items() if mode in FIELD_MODES.get(name, MODES)}
    if given.get("first_token") == "denoiser":
        known.pop("verify_threshold", None)  # which needs the other
    if defaults.get("do_sample") is False:
        known.pop("temperature", None)
    values = {**known, **given, "mode": mode}
    for name in ("eos_token_id", "stop"):
        if name in values and not isinstance(values[name], tuple):
            values[name] = (values[name],)
    if values.get("ignore_eos"):
        values["eos_token_id"] = ()
    resolved = ResolvedOptions(**values)
    _refuse_combinations(resolved, given)
    return resolved


def _checked_defaults(defaults: Mapping[str, object]) -> dict[str, Any]:
    """Those that are fields of ours, valid; ValueError names the file they come from."""
    known: dict[str, Any] = {
        name: value for name, value in defaults.items() if name in _CHECKS and value is not None
    }
    # Alone, so that other fields may be of other modes.
    mode = {name: known.pop(name) for name in ("mode",) if name in known}
    try:
        check(mode, _CHECKS)
        return GenerateOptions(**known).given() | mode
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None


def _refuse_unused(options: GenerateOptions, mode: Mode) -> None:
    """ValueError for a given field that the mode does not use."""
    for name, modes in FIELD_MODES.items():
        if getattr(options, name) is not None and mode not in modes:
            if name == "grammar":
                raise ValueError(
                    f"mode={mode!r} commits tokens that the context tower did not choose from left "
                    "to right, so it cannot follow a grammar; use mode='speculative' or 'ar'"
                )
            raise ValueError(
                f"{name}: has no effect in mode {mode}; leave it out, or use mode {either(modes)}"
            )


def _refuse_combinations(resolved: ResolvedOptions, given: Mapping[str, object]) -> None:
    """ValueError for values that make no sense together."""
    if resolved.verify_threshold > 0 and resolved.first_token != "context":
        source = "" if "verify_threshold" in given else "generation_config.json: "
        raise ValueError(
            f"{source}verify_threshold={resolved.verify_threshold} needs first_token='context': "
            "the context tower's token takes the place of the one that is rejected"
        )
    if resolved.drafts == "lookup":
        for name in ("draft_passes", "confidence_threshold"):
            if resolved.mode == "speculative" and name in given:
                raise ValueError(
                    f"{name}={given[name]}: has no effect on drafts='lookup', which no denoiser "
                    "writes; leave it out"
                )
    if resolved.adaptive and "schedule" in given:
        raise ValueError("schedule: has no effect with adaptive; leave one of them out")
    if resolved.temperature == 0:
        refuse_sampling(given)


def refuse_sampling(given: Mapping[str, object]) -> None:
    """ValueError for a given field that needs a temperature above 0."""
    for name, off in SAMPLED_ONLY.items():
        if given.get(name, off) != off:
            raise ValueError(
                f"{name}={given[name]}: has no effect at temperature 0, which is greedy; leave it "
                "out, or set a temperature above 0"
            )
