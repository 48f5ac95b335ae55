"""The native backend: each pass is one C++ call, with the weights where they lie, as they are.

Passes have any number of tokens, of any number of rows, which share each weight that is read. The
equations are those of the PyTorch layers.
"""

import ctypes
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from twotower.layers.mamba2 import MambaState
from twotower.model.backend import ContextInput, PassCosts
from twotower.model.precision import NATIVE_SCHEMES
from twotower.model.state import ContextCache, ForwardOutput
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView
from twotower.native import costs
from twotower.native.buffers import (
    Addresses,
    BufferPool,
    PassOutputs,
    StateSizes,
    known_states,
    past_states,
)
from twotower.native.denoiser import NativeDenoiser
from twotower.native.layout import LANES, Row
from twotower.native.library import library
from twotower.native.weights import native_head, native_table, native_tower


class NativeBackend:
    """Passes of a model that `twotower.backends.refusal` lets through.

    quantization=int8, int4 rounds the projections now, heads to int8; those that the model has left
    in its files are read for that. gguf: the context tower's matrices are as in the file, heads
    and a denoiser int8. kv_dtype: of new caches; passes read those in any of `layout.DTYPES`. The
    weights must neither change nor move afterwards. OSError (one line) where the library cannot be
    made. A tower without memory has no passes.
    """

    name, dtype = "native", torch.float32
    prefix_chunk, verifies_trees, chooses_tokens = LANES, True, False

    def __init__(
        self, model: TwoTower, quantization: str, kv_dtype: torch.dtype = torch.float32
    ) -> None:
        self.quantization, self.kv_dtype = quantization, kv_dtype
        self._model, self._width = model, model.config.hidden_size
        scheme = NATIVE_SCHEMES.get(quantization)
        if not all(parameter.is_contiguous() for parameter in model.parameters()):
            raise ValueError("the native backend needs contiguous weights")
        unread, tower = model.unread, model.context_tower
        table = native_table(tower.embeddings.weight, unread.get("context_tower.embeddings.weight"))
        rounded = None if scheme is None or scheme.as_stored else scheme
        self._context = native_tower(tower, table, "context_tower", True, rounded, unread)
        head = unread.get("context_lm_head.weight")
        self._context_head = native_head(model.context_lm_head, rounded, head)
        self._denoiser = (
            None
            if model.denoiser_tower is None
            else NativeDenoiser(model, scheme, table, self._context_head)
        )
        self._pool = BufferPool()
        self._sizes = StateSizes(() if self._context is None else self._context.layers)

    @cached_property
    def pass_costs(self) -> PassCosts:
        """What passes cost with the number of threads that PyTorch has at the first question."""
        return costs.of_backend(self, self._model)

    def context_pass(self, cache: ContextCache, asked: ContextInput) -> ForwardOutput:
        """Each row with its own past and its own number of tokens."""
        tower, (tokens, counts, is_draft, tree) = self._context, asked
        tokens = tokens.cpu().contiguous()
        assert tower is not None
        num_rows, length = tokens.shape
        layers = cache.make_room(length)
        pasts = known_states(cache.version) or past_states(layers, num_rows)
        lengths, version = cache.lengths.tolist(), cache.version
        given = [length] * num_rows if counts is None else counts.tolist()
        is_whole = min(given) == length  # every row fills all of its room
        outputs = PassOutputs(self._sizes, pasts, lengths, length, is_draft, is_whole, self._pool)
        hidden = (torch.empty if is_whole else torch.zeros)(num_rows, length, self._width)
        ids, ids_step = tokens.data_ptr(), 8 * length
        out, out_step = hidden.data_ptr(), 4 * length * self._width
        branches = () if tree is None else (Addresses(tree.depths), Addresses(tree.sees))
        rows: list[Row] = []
        for row, count in enumerate(given):
            if count:
                pointers = pasts.of(row), outputs.of(row), None, out + row * out_step
                shape = (part.of(row) for part in branches)
                rows.append(Row(count, lengths[row], ids + row * ids_step, *pointers, *shape))
            else:
                outputs.keep(layers, row)
        if rows:
            tower(rows, pasts.kv_dtype)

        def states_after(counts: Tensor) -> list[MambaState]:
            ends = counts.tolist()
            for row, end in enumerate(ends if is_draft and self._sizes.num_mambas else ()):
                tower.fill_states(end, pasts.of(row), outputs.after.of(row))
            found, cache.version.addresses = outputs.states(ends)
            return found

        def move_keys(row: int, path: Sequence[int]) -> None:
            tower.move_keys(path, lengths[row], pasts.of(row), pasts.kv_dtype)

        return ForwardOutput(hidden, version, states_after, move_keys)

    def context_head(self, hidden: Tensor) -> Tensor:
        """The context tower's logits."""
        assert self._context_head is not None
        return self._context_head(hidden)

    def best_after(self, hidden: Tensor, unused_ids: Sequence[int]) -> Tensor:
        """The best token after each of the context tower's outputs; logits are not kept."""
        assert self._context_head is not None
        return self._context_head.best(hidden, unused_ids)

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """The denoiser's logits."""
        assert self._denoiser is not None
        return self._denoiser(block, view, t)

    def rank(
        self,
        logits: Tensor,
        count: int = 1,
        unused_ids: Sequence[int] = (),
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The most probable tokens: `twotower.diffusion.most_probable`, in one way over logits."""
        size, logits = logits.shape[-1], logits.contiguous()
        count, num_unused = min(count, size), len(unused_ids)
        shape = *logits.shape[:-1], count
        ids, probs = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        library().twotower_rank(
            logits.data_ptr(), logits.numel() // size, size, count,
            None if chosen is None else chosen.contiguous().data_ptr(),
            (ctypes.c_int64 * num_unused)(*unused_ids), num_unused,
            ids.data_ptr(), probs.data_ptr(),
        )  # fmt: skip
        return ids, probs
