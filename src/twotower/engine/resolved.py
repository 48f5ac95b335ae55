"""What decodes a request: a value for every field of its options, and the modes that use it.

A field that is not given takes the checkpoint's default, and without one the library's:
`resolve_options` decides it once, and refuses what the chosen mode does not use.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, get_args

from twotower.arguments import (
    A_SWITCH,
    COUNT,
    INDEX,
    SHARE,
    Problem,
    check,
    either,
    instance,
    number,
    one_of,
    strings,
    token_ids,
)
from twotower.diffusion import SCHEDULES, Remask, Schedule
from twotower.engine.biases import LogitBias, as_pairs, biases
from twotower.engine.drafts import Drafts
from twotower.engine.grammar import Grammar

Mode = Literal["diffusion", "speculative", "posterior", "predict-and-noise", "ar", "mock-ar"]
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
_SEVERAL = ("eos_token_id", "stop")  # fields of one value or more
# Fields that need a temperature above 0, with the values that are off.
SAMPLED_ONLY: Mapping[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
DENOISER_ONLY = ("draft_passes", "confidence_threshold")  # of drafts that the denoiser writes


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

    @property
    def uses_denoiser(self) -> bool:
        """Whether the denoiser tower, if there is one, has a part in it."""
        return self.mode != "ar" and (self.mode, self.drafts) != ("speculative", "lookup")

    @cached_property
    def has_penalties(self) -> bool:
        """Whether the logits depend on more than the model."""
        is_penalised = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return bool(is_penalised) or self.repetition_penalty != 1


_FIELDS = {field.name: field for field in dataclasses.fields(ResolvedOptions)}
DEFAULTS: Mapping[str, object] = {name: field.default for name, field in _FIELDS.items()}
_CHECKS: Mapping[str, Problem] = {n: field.metadata["problem"] for n, field in _FIELDS.items()}
_MODES: Mapping[str, tuple[Mode, ...]] = {n: f.metadata["modes"] for n, f in _FIELDS.items()}
# The modes of each field that only some use.
FIELD_MODES = {name: modes for name, modes in _MODES.items() if modes != MODES}


class Given(Protocol):
    """Options of which some are given: `GenerateOptions`."""

    def given(self) -> dict[str, Any]:
        """The fields that are not None."""


def resolve_options(options: Given, defaults: Mapping[str, object]) -> ResolvedOptions:
    """The options with a checkpoint's defaults, and the library's, for fields that are not given.

    Defaults that are no fields of ours, or that the mode does not use, are passed over. ValueError
    (one line) for a bad default, and for fields that have no effect together.
    """
    own = {n: value for n, value in defaults.items() if n in _FIELDS and value is not None}
    given = options.given()
    try:
        known = checked(own)
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None
    mode: Mode = given.get("mode") or known.get("mode") or ResolvedOptions.mode
    refuse_unused(given, mode)
    known = {name: value for name, value in known.items() if mode in _MODES[name]}
    if given.get("first_token") == "denoiser":
        known.pop("verify_threshold", None)  # which needs the other
    # As in transformers; a file that it wrote does not sample where it does not say so.
    samples = defaults.get("do_sample", False if "transformers_version" in defaults else None)
    if samples is False:
        known.pop("temperature", None)
    elif samples is True:
        known = {"temperature": 1.0, "top_k": 50, **known}
    values = {**known, **given, "mode": mode}
    for name in _SEVERAL:
        if name in values and not isinstance(values[name], tuple):
            values[name] = (values[name],)
    if values.get("ignore_eos"):
        values["eos_token_id"] = ()
    resolved = ResolvedOptions(**values)
    _refuse_combinations(resolved, given)
    return resolved


def given_fields(options: object) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in vars(options).items() if value is not None}


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields, as they are kept; ValueError (one line) for one that cannot be."""
    found = dict(values)
    for name in _SEVERAL:
        if isinstance(found.get(name), list):
            found[name] = tuple(found[name])
    if isinstance(biased := found.get("logit_bias"), Mapping):
        found["logit_bias"] = as_pairs(biased)
    check(found, _CHECKS)
    if found.get("ignore_eos") and "eos_token_id" in found:
        raise ValueError("eos_token_id: has no effect with ignore_eos; leave one of them out")
    return found


def refuse_unused(given: Mapping[str, object], mode: Mode) -> None:
    """ValueError for a given field that the mode does not use."""
    for name in given:
        if name == "grammar" and mode not in _MODES[name]:
            raise ValueError(
                f"mode={mode!r} commits tokens that the context tower did not choose from left "
                "to right, so it cannot follow a grammar; use mode='speculative' or 'ar'"
            )
        if mode not in _MODES[name]:
            raise ValueError(
                f"{name}: has no effect in mode {mode}; leave it out, or use mode "
                f"{either(_MODES[name])}"
            )


def _refuse_combinations(resolved: ResolvedOptions, given: Mapping[str, object]) -> None:
    """ValueError for values that make no sense together."""
    if resolved.verify_threshold > 0 and resolved.first_token != "context":
        source = "" if "verify_threshold" in given else "generation_config.json: "
        raise ValueError(
            f"{source}verify_threshold={resolved.verify_threshold} needs first_token='context': "
            "the context tower's token takes the place of the one that is rejected"
        )
    if resolved.drafts == "lookup" and resolved.mode == "speculative":
        for name in DENOISER_ONLY:
            if name in given:
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
