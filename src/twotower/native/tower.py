"""A tower, and a head, as the library sees them: addresses of weights, then one call a pass."""

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from twotower.config import TowerConfig
from twotower.kernels.quantised import Bits, Quantised
from twotower.layers.rope import inverse_frequencies
from twotower.model.draft_tree import DraftTree
from twotower.native import layout
from twotower.native.layout import OPTIONAL, Row, Weight, layer_of, weight_names
from twotower.native.library import library
from twotower.native.packing import Packed

# Weights from this many on stream from memory, and threads share them: below, it costs more to wake
# another than it helps.
LARGE = 4_000_000


class NativeTower:
    """One tower's passes. The weights are not copied but for packed matrices; they must stay.

    weights: the parameters by name, float32 and contiguous. is_causal: whether a token is hidden
    from those before it. matrices: what is packed, by name; bits: of each, 8 where not given.
    """

    def __init__(
        self,
        config: TowerConfig,
        weights: Mapping[str, Tensor],
        is_causal: bool,
        matrices: Mapping[str, Tensor | Quantised],
        bits: Mapping[str, Bits],
    ) -> None:
        packed = Packed(matrices, bits)
        self._is_causal, self.layers = is_causal, [layer_of(x) for x in config.layers]
        num_weights = sum(w.numel() for w in weights.values()) + packed.num_bytes
        self._is_shared = num_weights >= LARGE
        arrays = []
        for index, layer in enumerate(self.layers):
            names = [f"layers.{index}.{name}" for name in weight_names(layer.kind)]
            array = (Weight * len(names))(*(_weight(name, weights, packed) for name in names))
            layer.weights = ctypes.addressof(array)
            arrays.append(array)
        layers = (layout.Layer * len(self.layers))(*self.layers)
        mask = weights.get("mask_embedding")
        turns = None if config.rotary is None else inverse_frequencies(*config.rotary)
        self._tower = layout.Tower(
            config.vocab_size, config.hidden_size, len(layers),
            0 if mask is None else mask.numel() // config.hidden_size, config.norm_eps,
            weights["embeddings.weight"].data_ptr(), None if mask is None else mask.data_ptr(),
            weights["norm_f.weight"].data_ptr(), None if turns is None else turns.data_ptr(),
            ctypes.addressof(layers),
        )  # fmt: skip
        self._kept = weights, packed, arrays, layers, turns  # what the addresses point to
        self._run, self._run_states = library().twotower_pass, library().twotower_states

    def __call__(self, rows: Sequence[Row], modulations: "Modulations | None" = None) -> None:
        """One pass over rows of tokens; fills each one's hidden (L, D), normed, and outputs."""
        array = (Row * len(rows))(*rows)
        if self._run(
            ctypes.byref(self._tower), len(rows), array, self._is_causal, self._threads(),
            modulations and modulations.address,
        ):  # fmt: skip
            raise IndexError("token ids leave the vocabulary")

    def fill_states(self, count: int, past: int, outputs: int) -> None:
        """The Mamba states after the first `count` of the tokens whose inputs a pass has left."""
        self._run_states(ctypes.byref(self._tower), count, self._threads(), past, outputs)

    def _threads(self) -> int:
        return torch.get_num_threads() if self._is_shared else 1


class Branches:
    """Depths and what is seen of each token of drafts that branch, as rows of a pass take them."""

    def __init__(self, tree: DraftTree) -> None:
        self._kept = np.array(tree.depths, np.int32), np.array(tree.sees, np.uint32)

    def of(self, row: int) -> tuple[int, int]:
        """Where those of a row begin, valid as long as this lives."""
        depths, sees = (part.ctypes.data + row * part.strides[0] for part in self._kept)
        return depths, sees


class Modulations:
    """Shift, scale and gate (layers, 3, D), contiguous, and where those of each layer begin."""

    def __init__(self, table: Tensor) -> None:
        first, step = table.data_ptr(), 4 * table.stride(0)
        self._kept = table
        self._layers = (layout.address * len(table))(*range(first, first + len(table) * step, step))
        self.address = ctypes.addressof(self._layers)


class NativeLinear:
    """x (..., K) -> (..., N) float32 by a weight (N, K), float32 or int8, as a pass has it."""

    def __init__(self, weight: Tensor | Quantised) -> None:
        full = {"": weight} if isinstance(weight, Tensor) else {}
        packed = Packed({} if isinstance(weight, Tensor) else {"": weight})
        self._kept = weight, packed
        self._rows, self._width = weight.shape
        self._is_shared = self._rows * self._width >= LARGE
        self._weight = _weight("", full, packed)
        self._run, self._run_bigrams = library().twotower_linear, library().twotower_bigrams

    def __call__(self, x: Tensor) -> Tensor:
        """x float32."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._rows)
        self._run(
            ctypes.byref(self._weight), self._rows, self._width,
            torch.get_num_threads() if self._is_shared else 1,
            x.data_ptr(), x.numel() // self._width, y.data_ptr(),
        )  # fmt: skip
        return y

    def add_bigrams(
        self,
        logits: Tensor,
        block: Tensor,
        mask_token_id: int,
        draft_ids: Tensor | None,
        inner: Tensor,
    ) -> Tensor:
        """As `layers.bigram.add_bigrams`, where this is the map from inner (ids, K) to logits."""
        assert logits.is_contiguous() and inner.is_contiguous()
        for own, ids in zip(logits, block.contiguous(), strict=True):
            self._run_bigrams(
                ctypes.byref(self._weight), self._rows, self._width,
                torch.get_num_threads() if self._is_shared else 1,
                inner.data_ptr(), None if draft_ids is None else draft_ids.data_ptr(),
                mask_token_id, ids.data_ptr(), len(ids), own.data_ptr(),
            )  # fmt: skip
        return logits


def _weight(name: str, weights: Mapping[str, Tensor], packed: Packed) -> Weight:
    full, address = weights.get(name), packed.addresses.get(name)
    if full is None and address is None and not name.endswith(OPTIONAL):
        raise ValueError(f"the native backend needs the weight {name}, which this model lacks")
    found = Weight(full=None if full is None else full.data_ptr())
    if address is not None:
        found.group, found.centred = packed.groups[name], name in packed.centred
        setattr(found, f"int{packed.bits[name]}", address)
    return found
