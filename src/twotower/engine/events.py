"""What decoding reports to its caller, as small records in the order in which things happen."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from twotower.engine.drafts import DrafterName
from twotower.model import ContextCache

# invalid: no usable request, or a grammar that cannot be followed; memory: does not fit;
# internal: our fault, details are in the log.
FailureKind = Literal["invalid", "memory", "cancelled", "deadline", "stopped", "internal"]
FinishReason = Literal["length", "eos", "stop", "content_filter"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """How probable the context tower finds a token after the text before it, and which others.

    Natural logarithms of its probabilities before penalties, temperature, top_k, top_p, min_p
    and grammar.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most probable tokens, the best first


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """One denoiser step on one row's block: the state after it. Lists have block_size entries."""

    row: int  # number of the prompt
    block_index: int  # from 0
    step: int  # from 0
    t: float  # masked fraction that the denoiser was given
    tokens: list[int]  # masked positions hold the mask token
    is_masked: list[bool]
    confidence: list[float]  # probability of each position's newest prediction; 1 if given
    nfe: int  # denoiser passes of the row so far


class Verified(NamedTuple):
    """What the context tower made of a draft, or of a block; None where there was none."""

    drafted: int | None = None  # speculative: draft tokens that were verified
    accepted: int | None = None  # speculative: those of them that were accepted
    drafter: DrafterName | None = None  # speculative: who wrote them, if not the grammar alone
    rejected: int | None = None  # diffusion with verify_threshold: of the block, before its end


@dataclass(frozen=True, kw_only=True)
class TokensCommitted:
    """Tokens that became part of a row's text: a block, or one token in token-by-token modes."""

    row: int
    block_index: int  # in token-by-token modes, the number of the token
    tokens: list[int]  # after cutting at EOS, a stop string or the length
    text: str  # what can be shown now: whole characters only; "" without a tokenizer
    nfe: int
    context_forwards: int
    logprobs: tuple[TokenLogprob, ...] | None = None  # of each token, when asked for
    drafted: int | None = None  # these as in Verified
    accepted: int | None = None
    drafter: DrafterName | None = None
    rejected: int | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The result of one prompt."""

    tokens: list[int]  # new tokens; an EOS that ended the row is the last
    text: str | None  # without special tokens and stop string; None without a tokenizer
    nfe: int  # denoiser passes
    context_forwards: int  # context tower passes: the prefill and each extension
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None  # of each token, when asked for
    # speculative: accepted tokens by who drafted them; lookups are of the text and of n-grams
    lookup_tokens: int = 0
    denoiser_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that were taken from the prefix cache

    @property
    def tokens_per_nfe(self) -> float | None:
        """New tokens by denoiser passes; None where there was none (AR)."""
        return len(self.tokens) / self.nfe if self.nfe else None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A row's last event. context: what a cache holds of its prompt and text, all but the newest
    tokens, with outputs, where the request asked for it; good until the next event.
    """

    row: int
    completion: Completion
    context: ContextCache | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A row that could not be decoded to its end: its last event, in one line for the user."""

    row: int
    kind: FailureKind
    message: str
    error: Exception | None = field(default=None, repr=False, compare=False)  # what was raised


Event = StepTaken | TokensCommitted | Finished | Failed
