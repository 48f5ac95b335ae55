"""The passes of decoding in plain PyTorch."""

from functools import partial

import torch
from torch import Tensor

from twotower import masks
from twotower.kernels import ssd
from twotower.layers.adaln import Modulation
from twotower.layers.bigram import add_bigrams
from twotower.layers.mamba2 import MambaInputs, states_after
from twotower.model.backend import ContextInput, PassCosts
from twotower.model.passes import Passes
from twotower.model.state import ContextCache, ForwardOutput
from twotower.model.view import ContextView


class EagerBackend:
    """Plain PyTorch: every model and device; what the other backends are compared with."""

    name, quantization = "eager", "none"
    prefix_chunk, verifies_trees, chooses_tokens = 64, True, False
    rank = best_after = None
    pass_costs = PassCosts({1: 1.0, 4: 1.4, 8: 1.6, 16: 1.75})

    def __init__(self, model: Passes) -> None:
        self._model = model
        self.dtype: torch.dtype = model.context_tower.norm_f.weight.dtype
        self.kv_dtype = self.dtype

    @torch.no_grad()
    def context_pass(self, cache: ContextCache, asked: ContextInput) -> ForwardOutput:
        self._model.require_read("backend=eager")
        tokens, counts, is_draft, tree = asked
        length, device = tokens.shape[1], self._model.context_device
        states_every: int | None = length
        if is_draft or 1 < length <= ssd.TILE:
            # The cache makes the states of all layers at once, which takes fewer operations.
            counts = states_every = None
        start: Tensor | int = cache.num_past
        own = None if tree is None else tree.mask.to(device)
        depths = None if tree is None else torch.tensor(tree.depths, device=device)
        if cache.is_uniform:  # all of the past is seen
            mask = masks.causal(length, 0, device) if own is None else own
        else:
            start = cache.lengths.to(device)
            if own is None:
                mask = masks.causal_rows(length, start, cache.num_past)
            else:
                mask = masks.tree_rows(own, start, cache.num_past)
        on_device = None if counts is None else counts.to(device)
        tower = self._model.context_tower
        past = cache.layers, mask, on_device, states_every, start, depths
        hidden, states = tower(tokens.to(device), *past)
        inputs = [state for state in states if isinstance(state, MambaInputs)]
        return cache.output_of(hidden, states, partial(states_after, inputs) if inputs else None)

    @torch.no_grad()
    def context_head(self, hidden: Tensor) -> Tensor:
        self._model.require_read("backend=eager")
        logits: Tensor = self._model.context_lm_head(hidden)
        return logits

    @torch.no_grad()
    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        self._model.require_read("backend=eager")
        device, mask = self._model.denoiser_device, None
        start: Tensor | int = view.num_past
        block, view = block.to(device), view.to(device)
        if view.lengths is not None:
            lengths = view.lengths.to(device)
            mask, start = masks.full_rows(block.shape[1], lengths, view.num_past), lengths[:, None]
        return denoiser_logits(self._model, block, view, mask, t, start)


def modulations(model: Passes, t: Tensor) -> list[Modulation]:
    """What time does: t (B, K) or (B, 1) -> for each layer shift, scale, gate (B, K, 1, D)."""
    m = model.t_block(model.t_embedder(t.to(model.denoiser_device)))
    m = m.unflatten(-1, (3, 1, -1))  # (B, K, 3, 1, D)
    tables = torch.stack(list(model.scale_shift_tables))  # (layers, 3, D)
    parts = (m + tables[:, None, None, :, None]).unbind(3)  # (layers, B, K, 1, D) each
    return [Modulation(*of_layer) for of_layer in zip(*map(torch.unbind, parts), strict=True)]


def denoiser_logits(
    model: Passes,
    block: Tensor,
    view: ContextView,
    mask: Tensor | None,
    t: Tensor | None,
    start: Tensor | int,
) -> Tensor:
    """The denoiser tower over blocks (B, T), and its head: (B, T, V) float32; mask and start as
    `DenoiserTower` takes them.
    """
    times = None if t is None else modulations(model, t.unsqueeze(-1))
    hidden = model.denoiser()(block.unsqueeze(1), view, mask, times, start)
    logits: Tensor = model.lm_head(hidden.squeeze(1)).float()
    bigram, table = model.bigram, model.denoiser().look_up
    if bigram is None:
        return logits
    ids = model.config.mask_token_id, model.draft_ids
    return add_bigrams(logits, block, *ids, lambda before: bigram(table(before)).float())
