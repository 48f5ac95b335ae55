"""The denoiser's native passes: its tower, with time conditioning, and its head."""

import copy
import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.model.eager import modulations
from twotower.model.precision import M, Scheme, shared_copy
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView
from twotower.native.buffers import Addresses, known_states, past_states
from twotower.native.layout import Row, address
from twotower.native.library import library
from twotower.native.tower import NativeLinear
from twotower.native.weights import Table, native_head, native_table, native_tower

_MAX_TABLES = 64  # remembered times
_ROWS = 8192  # of a table that are widened at a time


class NativeDenoiser:
    """Blocks to logits, by the denoiser tower of a model that has one. context_table, context_head:
    the other tower's, which may be its own, too.
    """

    def __init__(
        self,
        model: TwoTower,
        scheme: Scheme | None,
        context_table: Table,
        context_head: NativeLinear | None,
    ) -> None:
        self._model, self._width = model, model.config.hidden_size
        unread, tower, name = model.unread, model.denoiser(), "denoiser_tower"
        is_shared = tower.embeddings is model.context_tower.embeddings
        own = unread.get(f"{name}.embeddings.weight")
        table = context_table if is_shared else native_table(tower.embeddings.weight, own)
        self._tower = native_tower(tower, table, name, False, scheme, unread)
        is_shared, head = model.lm_head is model.context_lm_head, unread.get("lm_head.weight")
        self._head = context_head if is_shared else native_head(model.lm_head, scheme, head)
        proj, bigram = model.denoiser().hidden_proj, model.bigram
        self._hidden_proj = None if proj is None else native_head(proj, scheme)
        self._bigram_up = None if bigram is None else native_head(bigram.up_proj, scheme)
        self._inner: Tensor | None = None
        self._tables: dict[float, tuple[int, object]] = {}  # addresses, and what they point to
        if self._tower is not None and model.config.draft is None:
            size = min(model.config.block_size, _MAX_TABLES)
            self._make_tables(torch.arange(1, size + 1).div(size).tolist())  # parts that are masked

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
            if time is not None and time not in self._tables:
                self._make_tables([time])
            modulation = None if time is None else self._tables[time][0]
            self._tower(rows, pasts.kv_dtype, modulation)
        logits = self._head(hidden)
        if self._bigram_up is None:
            return logits
        draft_ids, inner = self._model.draft_ids, self._bigram_table()
        assert logits.is_contiguous() and inner.is_contiguous()
        for own, ids in zip(logits, block, strict=True):  # as `layers.bigram.add_bigrams`
            self._bigram_up.run(
                library().twotower_bigrams,
                inner.data_ptr(), None if draft_ids is None else draft_ids.data_ptr(),
                self._model.config.mask_token_id, ids.data_ptr(), len(ids), own.data_ptr(),
            )  # fmt: skip
        return logits

    def _pasts(self, view: ContextView, num_rows: int) -> Addresses:
        """Where the states of the layers are that the denoiser reads."""
        reads = self._model.config.reads
        if (known := known_states(view.version)) is not None:
            return Addresses(known.table.take(reads, 1), known.kept, known.kv_dtype)
        return past_states([view.layers[read] for read in reads], num_rows)

    @torch.no_grad()
    def _bigram_table(self) -> Tensor:
        """The small side of the bigram term for every token (V, rank), made at first use."""
        if self._inner is None:
            assert self._model.bigram is not None
            bigram, table = (
                shared_copy(self._model.bigram),
                self._model.denoiser().embeddings.weight,
            )
            if table.is_meta:  # the context tower's, in its file
                table = self._model.values_of("context_tower.embeddings")["weight"]
            bigram.down_proj = _in_float32(bigram.down_proj)
            parts = [bigram.inner(some.float()) for some in table.split(_ROWS)]
            self._inner = torch.cat(parts)
        return self._inner

    @torch.no_grad()
    def _make_tables(self, times: Sequence[float]) -> None:
        """Remember where the modulations of each layer begin at some times, and what keeps them
        there.
        """
        model = shared_copy(self._model)
        for name in ("t_embedder", "t_block", "scale_shift_tables"):
            setattr(model, name, _in_float32(getattr(model, name)))
        for t in times:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            found = modulations(model, torch.tensor([[t]]))
            table = torch.stack([torch.stack([*m]).flatten(1) for m in found])  # (layers, 3, D)
            first, step = table.data_ptr(), 4 * table.stride(0)
            layers = (address * len(table))(*range(first, first + len(table) * step, step))
            self._tables[t] = ctypes.addressof(layers), (layers, table)


def _in_float32(module: M) -> M:
    """The module, its weights widened where they are in half precision."""
    is_wide = all(weight.dtype == torch.float32 for weight in module.parameters())
    return module if is_wide else copy.deepcopy(module).float()
