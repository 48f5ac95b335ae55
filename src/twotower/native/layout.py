"""What the C++ engine reads: struct fields, and the order of each layer kind's weights.

layout.h declares the same; `compare` finds any difference when the library is loaded. `layer_of`
alone reads a configuration.
"""

import ctypes
from itertools import zip_longest

from twotower.config import AttentionSpec, LayerSpec, MambaSpec, MLPSpec

LANES = 16  # tokens of a tile: what the widest vector holds
address = ctypes.c_void_p
_int, _float = ctypes.c_int32, ctypes.c_float
_NAMES = {_int: "int32_t", _float: "float", address: "address"}


class Weight(ctypes.Structure):
    """A parameter in float32, and its int8 form if it has one (`packing.Packed`)."""

    _fields_ = [("full", address), ("packed", address)]


class Layer(ctypes.Structure):
    """Kind and sizes of a layer, and its weights in the order of `WEIGHTS`."""

    _fields_ = [
        ("kind", _int),
        ("q_heads", _int), ("kv_heads", _int), ("head_dim", _int),
        ("heads", _int), ("head_size", _int), ("groups", _int), ("state", _int), ("taps", _int),
        ("inner", _int),
        ("weights", address),
    ]  # fmt: skip

    @property
    def channels(self) -> int:
        """Channels of a Mamba layer's convolution."""
        return int(self.heads * self.head_size + 2 * self.groups * self.state)


class Tower(ctypes.Structure):
    """Sizes of a tower, its embeddings, final norm and layers."""

    _fields_ = [
        ("vocabulary", _int), ("width", _int), ("num_layers", _int), ("eps", _float),
        ("embeddings", address), ("norm", address), ("layers", address),
    ]  # fmt: skip


class Past(ctypes.Structure):
    """A layer's state before a pass."""

    _fields_ = [(name, address) for name in ("k", "v", "conv", "ssm")]


class Outputs(ctypes.Structure):
    """What a pass leaves of a layer; null where nobody needs it."""

    _fields_ = [(name, address) for name in ("k", "v", "conv", "ssm", "window", "mixed", "step")]


_STRUCTS: tuple[type[ctypes.Structure], ...] = (Weight, Layer, Tower, Past, Outputs)
# Names below `layers.{i}.`; a bias that the model lacks is null.
WEIGHTS = {
    MambaSpec.symbol: (
        "norm.weight", "mixer.in_proj.weight", "mixer.in_proj.bias", "mixer.conv1d.weight",
        "mixer.conv1d.bias", "mixer.dt_bias", "mixer.A_log", "mixer.D", "mixer.norm.weight",
        "mixer.out_proj.weight", "mixer.out_proj.bias",
    ),
    AttentionSpec.symbol: (
        "norm.weight", "mixer.q_proj.weight", "mixer.q_proj.bias", "mixer.k_proj.weight",
        "mixer.k_proj.bias", "mixer.v_proj.weight", "mixer.v_proj.bias", "mixer.o_proj.weight",
        "mixer.o_proj.bias",
    ),
    MLPSpec.symbol: (
        "norm.weight", "mixer.up_proj.weight", "mixer.up_proj.bias", "mixer.down_proj.weight",
        "mixer.down_proj.bias",
    ),
}  # fmt: skip


def layer_of(spec: LayerSpec) -> Layer:
    """Kind and sizes of a layer, without weights."""
    kind = ord(spec.symbol)
    match spec:
        case AttentionSpec():
            sizes = {
                "q_heads": spec.num_heads,
                "kv_heads": spec.num_kv_heads,
                "head_dim": spec.head_dim,
            }
        case MambaSpec():
            sizes = {
                "heads": spec.num_heads,
                "head_size": spec.head_dim,
                "groups": spec.num_groups,
                "state": spec.state_size,
                "taps": spec.conv_width,
            }
        case MLPSpec():
            sizes = {"inner": spec.intermediate_size}
        case _:
            raise ValueError(f"native passes have no {spec.label}")
    return Layer(kind=kind, **sizes)


def describe() -> str:
    """A line for each struct and each kind, as `describe_layout` of layout.h writes them."""
    lines = [f"LANES: {LANES}"]
    for struct in _STRUCTS:
        fields = [
            f"{_NAMES[kind]} {name}@{getattr(struct, name).offset}"
            for name, kind, *_ in struct._fields_
        ]
        lines.append(f"{struct.__name__}: {', '.join(fields)}, size {ctypes.sizeof(struct)}")
    lines += [f"{kind}: " + "".join(f"{n}, " for n in names) for kind, names in WEIGHTS.items()]
    return "".join(f"{line}\n" for line in lines)


def compare(theirs: str) -> str | None:
    """The first difference between the library's layout and this one, in words."""
    for one, other in zip_longest(theirs.splitlines(), describe().splitlines(), fillvalue=""):
        if one != other:
            (name, _, cpp), (_, _, python) = one.partition(": "), other.partition(": ")
            parts = zip_longest(cpp.split(", "), python.split(", "), fillvalue="nothing")
            a, b = next(((a, b) for a, b in parts if a != b), (one, other))
            return f"{name}: {a!r} in C++, {b!r} in Python"
    return None
