"""The options that users set: of one request and of the engine, each field with its help."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from twotower.arguments import COUNT, INDEX, Problem, check_fields, one_of
from twotower.diffusion import Remask, Schedule
from twotower.documented import public_options
from twotower.engine.biases import LogitBias
from twotower.engine.drafts import Drafts
from twotower.engine.grammar import Grammar
from twotower.engine.resolved import (
    DEFAULTS,
    FirstToken,
    Mode,
    checked,
    given_fields,
    refuse_unused,
)

Overlap = Literal["auto", "on", "off"]
_ENGINE_CHECKS: dict[str, Problem] = {
    "batch_size": COUNT,
    "max_waiting": COUNT,
    "overlap": one_of(*get_args(Overlap)),
    "prefix_cache_bytes": INDEX,
    "lookup_cache_bytes": INDEX,
}


@public_options
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How requests share the machine. None of these options changes a text."""

    batch_size: int = 16
    """Maximum number of sequences decoded at the same time; others wait."""
    max_waiting: int = 256
    """Server: maximum number of prompts that wait; further ones are refused."""
    overlap: Overlap = "auto"
    """Run both towers at the same time: the denoiser drafts for one half of the batch while the
    context tower verifies the other. auto: on if the towers are on two devices."""
    prefix_cache_bytes: int = 0
    """Bytes of the prefix cache: a prompt that begins like an earlier text reuses its prefill. 0 is
    off."""
    lookup_cache_bytes: int = 8 << 20
    """Bytes of the lookup cache: n-grams of finished answers, from which prompt lookup drafts in
    later requests. 0 is off."""

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
    """speculative: where drafts come from. lookup: prompt lookup (n-gram matching), a copy of what
    followed the last tokens earlier in the text; also n-grams of earlier answers (lookup cache),
    and of those that `twotower adapt` has seen. denoiser: the denoiser tower. auto: in each cycle
    the one that is expected to save more time."""
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
    """predict-and-noise: instead of the schedule, commit one token in the first steps, then equal
    numbers."""

    given = given_fields  # a method

    def __post_init__(self) -> None:
        for name, value in checked(self.given()).items():
            object.__setattr__(self, name, value)
        if self.mode is not None:
            refuse_unused(self.given(), self.mode)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.given().items())
        return f"GenerateOptions({shown})"


public_options(GenerateOptions, DEFAULTS)
