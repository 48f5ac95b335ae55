"""The reverse process for one block: a loop of denoiser passes, yielded step by step.

Decides which rows need a pass, the t they get, and which predictions become tokens.
Knows no model, cache or tokenizer: the caller passes a denoise function, extends the
context by the finished block, and drops rows that ended.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower.diffusion.chance import draw_noise
from twotower.diffusion.commit import Predictions, commit_confident
from twotower.diffusion.noise import alpha, grid_time
from twotower.diffusion.ranking import Rank, most_probable
from twotower.diffusion.sampler import Sampler, SamplerKind
from twotower.diffusion.sampling import choose
from twotower.diffusion.scheduled import commit_posterior, commit_remasked

# tokens (R, T), t (R,) float32, rows (R,) int64 ascending, of the batch -> logits (R, T, V), which
# nobody else uses
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# The masked positions that take their predicted token in a step: bool (R, T).
_RULES: dict[SamplerKind, Callable[[Sampler, Predictions], Tensor]] = {
    "confidence": commit_confident,
    "predict-and-noise": commit_remasked,
    "posterior": commit_posterior,
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of denoise_block; every tensor is a snapshot that later steps do not change.

    To draw a step: is_masked says which cells are still open, tokens what the others hold
    (open cells hold the mask token), confidence how sure the newest prediction was; a cell
    is new if the previous Step (or the block) had it masked. A row absent from rows made
    no pass in this step; it is finished once none of its cells is masked.
    """

    index: int  # step number, from 0
    rows: Tensor  # (R,) int64 ascending, rows that made a denoiser pass in this step
    t: Tensor  # (B,) float32, t of this step; 0 for rows already finished
    tokens: Tensor  # (B, T) int64 after the step
    is_masked: Tensor  # (B, T) bool after the step
    confidence: Tensor  # (B, T) float32 probability of each last prediction; 1 for given tokens
    nfe: Tensor  # (B,) int64, passes each row has made so far
    # Of each cell that was masked before this step, the next most probable tokens and how probable
    # they are, (R, T, sampler.num_others) each; None where that is 0, or a backend chooses.
    others: tuple[Tensor, Tensor] | None = None


def denoise_block(
    denoise: Denoise,
    block: Tensor,
    sampler: Sampler,
    generators: Sequence[torch.Generator] = (),
    token_ids: Tensor | None = None,
    rank: Rank = most_probable,
) -> Iterator[Step]:
    """Fill the masked positions of block (B, T) int64, yielding a Step per step.

    generators: one CPU generator per row, needed if anything is random. token_ids (V,): what the
    logits are of, where they are not of the whole vocabulary. rank: what finds the best of them.
    Committed tokens never change; a block without masked positions yields nothing.
    """
    assert len(generators) == len(block) or not (generators or sampler.is_random)
    if not sampler.is_random:
        generators = ()  # nothing to draw
    most = max(sampler.steps.tolist(), default=0)
    sampler = _ready(sampler, block.device, token_ids)
    tokens, is_masked = block, block == sampler.mask_token_id
    confidence = torch.ones(block.shape, device=block.device)
    nfe = torch.zeros(block.shape[0], dtype=torch.int64, device=block.device)
    rows = is_masked.any(-1).nonzero().flatten()  # rows that need a new pass
    kept_rows, kept_logits = rows[:0], None  # unfinished rows that reuse their last pass
    step = 0
    while len(rows) + len(kept_rows) > 0:
        is_whole = len(rows) == len(block)  # as it mostly is: nothing to pick out and put back
        now = rows if is_whole else torch.cat([rows, kept_rows])
        own = sampler if is_whole else sampler.select(now)
        masked = _pick(is_masked, now, is_whole)
        times = _times(own, masked, step)
        t = times if is_whole else torch.zeros_like(confidence[:, 0]).index_copy(0, now, times)
        logits = _logits(denoise, own.mask_token_id, tokens, t, rows, kept_logits)
        row_generators = [generators[row] for row in now.tolist()] if generators else ()
        noise = draw_noise(logits, own, row_generators) if generators else None
        chosen = None if noise is None else choose(logits, own, noise)
        ids, probs = rank(logits, 1 + own.num_others, own.unused_ids, chosen)
        ids = ids if token_ids is None else token_ids[ids]
        found = Predictions(
            step=step, generators=row_generators, is_masked=masked, logits=logits,
            tokens=ids[..., 0], confidence=probs[..., 0], is_last=step + 1 >= most,
        )  # fmt: skip
        commit = _RULES[own.kind](own, found)

        nfe = _put(nfe, rows, _pick(nfe, rows, is_whole) + 1, is_whole)
        newest = torch.where(commit, found.tokens, _pick(tokens, now, is_whole))
        tokens = _put(tokens, now, newest, is_whole)
        sure = torch.where(masked, found.confidence, _pick(confidence, now, is_whole))
        confidence = _put(confidence, now, sure, is_whole)
        still_masked = masked ^ commit  # what is committed was masked
        is_masked = _put(is_masked, now, still_masked, is_whole)
        yield Step(
            index=step, rows=rows, t=t, tokens=tokens, is_masked=is_masked,
            confidence=confidence, nfe=nfe, others=_others(ids, probs, masked),
        )  # fmt: skip
        if not bool(still_masked.any()):
            return
        is_open = still_masked.any(-1)
        is_kept = is_open & ~commit.any(-1) & sampler.reuse_unchanged
        rows, kept_rows = now[is_open & ~is_kept].sort().values, now[is_kept]
        kept_logits = logits[is_kept] if len(kept_rows) > 0 else None
        step += 1


def _ready(sampler: Sampler, device: torch.device, token_ids: Tensor | None) -> Sampler:
    """The sampler where the block is, for logits of these ids."""
    # Ids of the vocabulary that are no token: of a vocabulary of tokens alone there are none.
    unused = sampler.unused_ids if token_ids is None else ()
    if sampler.steps.device == device and unused == sampler.unused_ids:
        return sampler
    steps, threshold = sampler.steps.to(device), sampler.threshold.to(device)
    return replace(sampler, steps=steps, threshold=threshold, unused_ids=unused)


def _pick(value: Tensor, rows: Tensor, is_whole: bool) -> Tensor:
    """The rows of a value; itself where they are all, in order."""
    return value if is_whole else value[rows]


def _put(value: Tensor, rows: Tensor, new: Tensor, is_whole: bool) -> Tensor:
    """The value with new rows in the place of its own."""
    return new if is_whole else value.index_copy(0, rows, new)


def _times(sampler: Sampler, is_masked: Tensor, step: int) -> Tensor:
    """The t of each row: its masked fraction, or what the schedule says."""
    if sampler.kind == "confidence":
        return is_masked.float().mean(-1)
    return (1.0 - alpha(sampler.schedule, grid_time(step, sampler.steps))).float()


def _logits(
    denoise: Denoise,
    mask_token_id: int,
    tokens: Tensor,
    t: Tensor,
    rows: Tensor,
    kept_logits: Tensor | None,
) -> Tensor:
    """Logits of rows (a new pass), then those kept, with the mask token banned, float32."""
    if len(rows) == 0:
        assert kept_logits is not None
        return kept_logits
    is_whole = len(rows) == len(tokens)
    logits = denoise(_pick(tokens, rows, is_whole), _pick(t, rows, is_whole), rows).float()
    if mask_token_id < logits.shape[-1]:
        logits.select(-1, mask_token_id).fill_(float("-inf"))
    return logits if kept_logits is None else torch.cat([logits, kept_logits])


def _others(ids: Tensor, probs: Tensor, is_masked: Tensor) -> tuple[Tensor, Tensor] | None:
    """The most probable tokens beside those that were predicted, and how probable they are."""
    if ids.shape[-1] == 1:
        return None
    return ids[..., 1:], probs[..., 1:].masked_fill(~is_masked[..., None], 0.0)
