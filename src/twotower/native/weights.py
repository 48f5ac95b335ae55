"""What the library gets of a model, made once: addresses of weights, and packed matrices."""

import ctypes
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from twotower.kernels.quantised import Bits, Blocks, Quantised
from twotower.layers.quantised import QuantisedMatrix
from twotower.layers.rope import inverse_frequencies
from twotower.model.passes import Unread, UnreadMatrix
from twotower.model.precision import Scheme, weight_bits
from twotower.model.tower import Tower
from twotower.native import layout
from twotower.native.layout import (
    DTYPES,
    OPTIONAL,
    ROUTER_BIAS,
    STORED,
    Weight,
    is_matrix,
    layer_of,
    weight_names,
)
from twotower.native.packing import Packed
from twotower.native.tower import NativeLinear, NativeTower

_TABLE = "embeddings.weight"


class Table(NamedTuple):
    """Embeddings: what they are in, by `layout.STORED`, their address, and what lies there."""

    dtype: int
    first: int
    kept: Tensor


def native_table(weight: Tensor, unread: UnreadMatrix | None) -> Table:
    """A tower's embeddings as they are: in memory, or of a GGUF type."""
    found = weight.detach() if unread is None else unread[0]
    assert isinstance(found, Tensor | Blocks)
    kept, kind = (
        (found.data, STORED.index(found.kind))
        if isinstance(found, Blocks)
        else (found, DTYPES.index(found.dtype))
    )
    return Table(kind, kept.data_ptr(), kept)


def native_tower(
    tower: Tower, table: Table, name: str, is_causal: bool, scheme: Scheme | None, unread: Unread
) -> NativeTower | None:
    """The passes of a tower; None where it has no memory. Packed is what is so already, and all
    that the scheme quantises of the tower of this name, or without one what is in files, as it is
    there; of other weights vectors in half precision are widened, and nothing else is copied.
    """
    if tower.norm_f.weight.is_meta:
        return None
    own = {key.removeprefix(f"{name}."): one for key, one in unread.items()}
    weights = {
        key: weight.detach() if is_matrix(key) else weight.detach().float()
        for key, weight in tower.named_parameters()
        if key != _TABLE
    }
    weights |= {
        key: bias.float() for key, bias in tower.named_buffers() if key.endswith(ROUTER_BIAS)
    }
    matrices: dict[str, Tensor | Quantised] = {
        key: module.matrix
        for key, module in tower.named_modules()
        if isinstance(module, QuantisedMatrix)
    }
    bits: dict[str, Bits] = {}
    for key, weight in weights.items():
        found = (own[key].stored_bits or 8) if key in own else None
        if scheme is not None:
            found = weight_bits(f"{name}.{key}", weight.shape, scheme)
        if found is not None:
            matrices[key], bits[key] = weight, found
    packed, config = Packed(matrices, bits, own), tower.config
    layers, arrays = [layer_of(spec) for spec in config.layers], []
    for index, layer in enumerate(layers):
        names = [f"layers.{index}.{one}" for one in weight_names(layer.kind)]
        array = (Weight * len(names))(*(_weight(one, weights, packed) for one in names))
        layer.weights = ctypes.addressof(array)
        arrays.append(array)
    of_layers = (layout.Layer * len(layers))(*layers)
    mask = weights.get("mask_embedding")
    turns = None if config.rotary is None else inverse_frequencies(*config.rotary)
    turn_factor = 1.0 if config.rotary is None else config.rotary[0].attention_factor
    struct = layout.Tower(
        config.vocab_size, config.hidden_size, len(layers),
        0 if mask is None else mask.numel() // config.hidden_size, config.norm_eps,
        turn_factor, table.dtype, table.first,
        None if mask is None else mask.data_ptr(),
        weights["norm_f.weight"].data_ptr(), None if turns is None else turns.data_ptr(),
        ctypes.addressof(of_layers),
    )  # fmt: skip
    num_weights = config.vocab_size * config.hidden_size + packed.num_bytes
    num_weights += sum(w.numel() for w in weights.values())
    kept = weights, packed, arrays, of_layers, turns, table
    return NativeTower(struct, layers, is_causal, num_weights, kept)


def native_head(
    head: nn.Module, scheme: Scheme | None, unread: UnreadMatrix | None = None
) -> NativeLinear | None:
    """A head, in int8 where a scheme rounds anything; None where it is neither in memory nor in
    files.
    """
    weight = head.weight
    assert isinstance(weight, Tensor | QuantisedMatrix)
    if unread is None and (weight if isinstance(weight, Tensor) else weight.qdata).is_meta:
        return None
    if isinstance(weight, QuantisedMatrix):
        return native_linear(weight.matrix, unread=unread)
    return native_linear(weight.detach(), scheme, unread)


def native_linear(
    weight: Tensor | Quantised,
    scheme: Scheme | None = None,
    unread: UnreadMatrix | None = None,
) -> NativeLinear:
    """A linear map by a weight (N, K), as it is unless a scheme rounds it to int8."""
    is_full = isinstance(weight, Tensor) and scheme is None and unread is None
    full = {"": weight} if isinstance(weight, Tensor) and is_full else {}
    packed = Packed({} if full else {"": weight}, unread={} if unread is None else {"": unread})
    return NativeLinear(_weight("", full, packed), weight.shape, (full, packed))


def _weight(name: str, weights: Mapping[str, Tensor], packed: Packed) -> Weight:
    full, address = weights.get(name), packed.addresses.get(name)
    if full is None and address is None and not name.endswith(OPTIONAL):
        raise ValueError(f"the native backend needs the weight {name}, which this model lacks")
    found = Weight()
    if full is not None and not full.is_meta:
        found.dtype = DTYPES.index(full.dtype)
        setattr(found, "half" if found.dtype else "full", full.data_ptr())
    if address is not None:
        found.group, found.centred = packed.groups[name], name in packed.centred
        setattr(found, f"int{packed.bits[name]}", address)
    return found
