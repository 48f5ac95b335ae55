"""What a request may ask of decoding, validated, with the checkpoint's own defaults behind it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from twotower.diffusion import BlockSampler, Remask, SamplerKind, SamplingParams, Schedule
from twotower.engine.grammar import Grammar

Mode = Literal["diffusion", "speculative", "posterior", "predict-and-noise", "ar", "mock-ar"]
Queues = Literal["auto", "one", "two"]
FirstToken = Literal["denoiser", "context"]
MODES: tuple[Mode, ...] = get_args(Mode)
MOST_LOGPROBS = 100  # alternatives to each token
LEAST_TOP_P = 1e-6  # float32 must tell it from 0
_SAMPLERS: dict[str, SamplerKind] = {
    "diffusion": "confidence",
    "posterior": "posterior",
    "predict-and-noise": "predict-and-noise",
}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How prompts share the machine; no text depends on it."""

    max_rows: int = 16
    """Prompts decoded at the same time; the others wait for a place."""
    queues: Queues = "auto"
    """one: denoiser and context work follow one another. two: rows are dealt to two groups, and
    while one is in the denoiser the other is in the context tower. auto: two where the towers are
    on two devices."""
    prefix_cache_bytes: int = 0
    """Memory for contexts of earlier texts, which prompts that begin alike need not read again;
    0 keeps none."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows} must be at least 1")
        if self.prefix_cache_bytes < 0:
            raise ValueError(f"prefix_cache_bytes={self.prefix_cache_bytes} must be at least 0")
        if self.queues not in get_args(Queues):
            raise ValueError(
                f"queues={self.queues!r} is unknown; use one of {', '.join(get_args(Queues))}"
            )


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(EngineOptions):
    """`EngineOptions` of a worker, whose requests come while it runs."""

    max_waiting: int = 256
    """Requests that may wait for a place; more are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting={self.max_waiting} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to decode one prompt. A checkpoint's `generation_config.json` may set other defaults; a
    field that is given here wins. Source: system.md section 4.
    """

    mode: Mode = "diffusion"
    """diffusion: commit confident tokens of a block, pass after pass. speculative: the text of ar,
    drafted by the denoiser and verified by the context tower. posterior, predict-and-noise: the
    other block samplers. ar: the context tower alone, token by token.
    mock-ar: the denoiser, token by token."""
    max_new_tokens: int = 128
    """Most tokens to write; the last block is cut to it."""
    block_size: int = 16
    """Tokens per block; what the model was trained on unless given. More ruins the text."""
    steps_per_block: int = 16
    """Most denoiser passes per block."""
    first_token: FirstToken = "denoiser"
    """diffusion: who chooses a block's first token: the denoiser, as published, or the context
    tower, which has read all before it and so needs no pass for it."""
    review_threshold: float = 0.0
    """diffusion: the context tower, which must read a block anyway, gives back the first token to
    which it gives a probability below this, and all behind it; its own opens the next block there.
    0, as published, keeps all. Above 0 it needs first_token="context"."""
    draft_passes: int = 1
    """speculative: most denoiser passes per draft."""
    confidence_threshold: float = 0.8
    """diffusion: predictions more probable than this are committed at once."""
    temperature: float = 0.0
    """0 takes the most probable token; above it, samples."""
    top_k: int | None = None
    """Sample among the k most probable tokens only."""
    top_p: float | None = None
    """Sample among the most probable tokens that make up this probability only."""
    seed: int = 0
    """Seed of the row's own randomness: a row's text does not depend on its neighbours."""
    eos_token_id: int | tuple[int, ...] | Literal["config"] | None = "config"
    """Token that ends a row; "config" takes the checkpoint's, None never ends."""
    stop: str | tuple[str, ...] | None = None
    """Text that ends a row; it is not part of the returned text. Needs a tokenizer."""
    logprobs: int | None = None
    """Report each token's log-probability under the context tower, with this many of the most
    probable ones beside it; 0 reports the token's own."""
    grammar: Grammar | None = None
    """ar, speculative: what the text must match, from json_schema, tool_call, regex or lark."""
    schedule: Schedule = "linear"
    """posterior, predict-and-noise: how the masked share falls over the steps."""
    remask: Remask = "confidence"
    """predict-and-noise: what returns to the mask: least confident, least margin, or random."""
    adaptive: bool = False
    """predict-and-noise: commit one token a step at first, equal shares later."""

    # Which fields the caller named: only the others take a checkpoint's defaults.
    def __new__(cls, **given: object) -> "GenerateOptions":
        options = super().__new__(cls)
        object.__setattr__(options, "given", frozenset(given))
        return options

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, kind in _KINDS.items():
            _check_kind(name, getattr(self, name), kind)
        for name, allowed in (
            ("mode", MODES),
            ("first_token", get_args(FirstToken)),
            ("schedule", get_args(Schedule)),
            ("remask", get_args(Remask)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}"
                )
        for name, lowest in (
            ("max_new_tokens", 1),
            ("block_size", 1),
            ("steps_per_block", 1),
            ("draft_passes", 1),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {lowest}")
        _check_range("confidence_threshold", self.confidence_threshold, 0.0, 1.0)
        _check_range("review_threshold", self.review_threshold, 0.0, 1.0)
        if "first_token" in self.given:  # type: ignore[attr-defined]  # else defaults may bring it
            self._require_opening()
        _check_range("temperature", self.temperature, 0.0, math.inf)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        if self.top_k is not None:
            _check_range("top_k", self.top_k, 1, math.inf)
        if self.top_p is not None:
            _check_range("top_p", self.top_p, LEAST_TOP_P, 1.0)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if not all(self.stop_strings):
            raise ValueError("stop has an empty string; leave it out")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        return (
            () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        )

    @property
    def is_opened_by_context(self) -> bool:
        """Whether the context tower chooses the first token of each block."""
        return self.mode == "diffusion" and self.first_token == "context"

    @property
    def is_reviewed(self) -> bool:
        """Whether the context tower may give tokens of a block back."""
        return self.mode == "diffusion" and self.review_threshold > 0

    @property
    def is_block_mode(self) -> bool:
        """Whether the mode fills blocks with denoiser passes."""
        return self.mode in _SAMPLERS or self.mode == "speculative"

    def with_defaults(self, defaults: Mapping[str, object]) -> "GenerateOptions":
        """These options with a checkpoint's values for every field that was not given.

        Fields that are not ours are passed over; ValueError names the file for a bad value.
        """
        given: frozenset[str] = self.given  # type: ignore[attr-defined]  # set by __new__
        names = {field.name for field in dataclasses.fields(self)}
        taken = {n: v for n, v in defaults.items() if n in names - given and v is not None}
        if defaults.get("do_sample") is False:
            taken.pop("temperature", None)
        if "first_token" in given and self.first_token == "denoiser":
            taken.pop("review_threshold", None)  # which needs the other
        found = self
        if taken:
            values = {n: getattr(self, n) for n in given} | {n: _plain(v) for n, v in taken.items()}
            try:
                found = GenerateOptions(**values)  # types are checked by __post_init__
                if "review_threshold" in taken:
                    found._require_opening()
            except ValueError as error:
                raise ValueError(f"generation_config.json: {error}") from None
        found._require_opening()
        return found

    def _require_opening(self) -> None:
        """ValueError for a review without what it stands on."""
        if self.review_threshold > 0 and self.first_token != "context":
            raise ValueError(
                f"review_threshold={self.review_threshold} needs first_token='context': the "
                "context tower's token takes the place of one that is given back"
            )

    def block_sampler(self, mask_token_id: int) -> BlockSampler:
        """The sampler of a block mode."""
        return BlockSampler(
            kind=_SAMPLERS[self.mode],
            steps=self.steps_per_block,
            confidence_threshold=self.confidence_threshold,
            schedule=self.schedule,
            remask=self.remask,
            adaptive=self.adaptive,
            temperature=self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            mask_token_id=mask_token_id,
        )

    def draft_sampler(self, mask_token_id: int) -> BlockSampler:
        """The sampler of a draft: greedy, because the context tower has the last word anyway."""
        return BlockSampler(
            kind="confidence",
            steps=self.draft_passes,
            confidence_threshold=self.confidence_threshold,
            mask_token_id=mask_token_id,
        )


def sampling_params(options: Sequence[GenerateOptions]) -> SamplingParams:
    """How each of several rows chooses its tokens."""
    return SamplingParams(
        temperature=torch.tensor([o.temperature for o in options]),
        top_k=torch.tensor([o.top_k or 0 for o in options]),
        top_p=torch.tensor([1.0 if o.top_p is None else o.top_p for o in options]),
    )


_KINDS: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "block_size": (int,),
    "steps_per_block": (int,),
    "draft_passes": (int,),
    "confidence_threshold": (int, float),
    "review_threshold": (int, float),
    "temperature": (int, float),
    "top_k": (int, type(None)),
    "top_p": (int, float, type(None)),
    "seed": (int,),
    "eos_token_id": (int, tuple, str, type(None)),
    "stop": (str, tuple, type(None)),
    "adaptive": (bool,),
    "logprobs": (int, type(None)),
    "grammar": (Grammar, type(None)),
}


def _check_kind(name: str, value: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name}={value!r} must be of type {wanted}")
    if name == "eos_token_id" and isinstance(value, str) and value != "config":
        raise ValueError(f"eos_token_id={value!r} must be a token id, 'config' or None")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isinf(value):
        allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name}={value} must be {allowed}")


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
