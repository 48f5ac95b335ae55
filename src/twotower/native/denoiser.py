"""The denoiser's native passes: its tower, with time conditioning, and its head."""

import ctypes

import torch
from torch import Tensor

from twotower.model.precision import Scheme
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView
from twotower.native.buffers import Addresses, known_states, past_states
from twotower.native.layout import Row, address
from twotower.native.tower import NativeLinear
from twotower.native.weights import native_head, native_tower

_MAX_TABLES = 64  # remembered times; a block of 16 tokens has 16 masked fractions


class NativeDenoiser:
    """Blocks to logits, by the denoiser tower of a model that has one. context_head: the other
    tower's, which may be its own, too.
    """

    def __init__(
        self, model: TwoTower, scheme: Scheme | None, context_head: NativeLinear | None
    ) -> None:
        self._model, self._width = model, model.config.hidden_size
        self._tower = native_tower(model.denoiser(), "denoiser_tower", False, scheme)
        is_shared = model.lm_head is model.context_lm_head
        self._head = context_head if is_shared else native_head(model.lm_head, scheme)
        proj, bigram = model.denoiser().hidden_proj, model.bigram
        self._hidden_proj = None if proj is None else native_head(proj, scheme)
        self._bigram_up = None if bigram is None else native_head(bigram.up_proj, scheme)
        self._inner: Tensor | None = None
        self._tables: dict[float, tuple[int, object]] = {}  # addresses, and what they point to

    def __call__(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """Rows of one time share a pass; leaves no state."""
        assert self._tower is not None and self._head is not None
        block = block.contiguous()
        hidden = torch.empty(*block.shape, self._width)
        added = None
        if self._hidden_proj is not None and view.hidden is not None:
            added = self._hidden_proj(view.hidden.squeeze(1))
        pasts = self._pasts(view, len(block))
        lengths = [view.num_past] * len(block) if view.lengths is None else view.lengths.tolist()
        first, step = block.data_ptr(), 8 * block.shape[1]
        out, out_step = hidden.data_ptr(), 4 * block.shape[1] * self._width
        times: dict[float | None, list[Row]] = {}
        for row, time in enumerate([None] * len(block) if t is None else t.tolist()):
            pointer = None if added is None else added[row].data_ptr()
            own = first + row * step, pasts.of(row), None, pointer, out + row * out_step
            times.setdefault(time, []).append(Row(block.shape[1], lengths[row], *own))
        for time, rows in times.items():
            self._tower(rows, None if time is None else self._modulations(time))
        logits = self._head(hidden)
        if self._bigram_up is None:
            return logits
        ids = self._model.config.mask_token_id, self._model.draft_ids
        return self._bigram_up.add_bigrams(logits, block, *ids, self._bigram_table())

    def _pasts(self, view: ContextView, num_rows: int) -> Addresses:
        """Where the states of the layers are that the denoiser reads."""
        reads = self._model.config.reads
        if (known := known_states(view.version)) is not None:
            return Addresses(known.table.take(reads, 1), known.kept)
        return past_states([view.layers[read] for read in reads], num_rows)

    @torch.no_grad()
    def _bigram_table(self) -> Tensor:
        """The small side of the bigram term for every token (V, rank), made at first use."""
        if self._inner is None:
            assert self._model.bigram is not None
            self._inner = self._model.bigram.inner(self._model.denoiser().embeddings.weight)
        return self._inner

    @torch.no_grad()
    def _modulations(self, t: float) -> int:
        """Where those of each layer at time t begin, computed once."""
        if t not in self._tables:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            found = self._model.modulations(torch.tensor([[t]]))
            table = torch.stack([torch.stack([*m]).flatten(1) for m in found])  # (layers, 3, D)
            first, step = table.data_ptr(), 4 * table.stride(0)
            layers = (address * len(table))(*range(first, first + len(table) * step, step))
            self._tables[t] = ctypes.addressof(layers), (layers, table)
        return self._tables[t][0]
