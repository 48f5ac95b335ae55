"""Which weights are quantised, and a model whose matrices are.

`weight_bits` alone decides what keeps full precision; packing, loading and native code ask it.
"""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from twotower.kernels.quantised import BLOCK_TYPES, Bits, Matrices, to_eight_bits
from twotower.layers.moe import Experts
from twotower.layers.quantised import (
    MappedExperts,
    QuantisedExperts,
    QuantisedLinear,
    QuantisedMatrix,
)
from twotower.model.two_tower import TwoTower

Weights = Literal["int8", "int4"]
ExpertStorage = Literal["memory", "mmap"]
EMBEDDINGS = "_tower.embeddings.weight"
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 32  # of int4 when none is named
M = TypeVar("M", bound=nn.Module)
_HEAD = re.compile(r"(context_)?lm_head\.weight")
_PROJECTION = re.compile(
    r"(context|denoiser)_tower\.layers\.\d+\.mixer\."
    r"((in|out|q|k|v|o)_proj\.weight"  # Mamba, attention
    r"|(shared_experts\.)?(up|down|gate)_proj\.weight"  # MLP, shared expert
    r"|experts\.(\d+\.(up|down|gate)_proj\.weight|(up|down|gate)_proj))"  # in a file, stacked
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the matrices of a model are quantised; ValueError (one line) for what does not exist."""

    weights: Weights
    """int8: a scale per row. int4: a scale and a zero per group of a row; heads int8."""
    group_size: int | None = None
    """Numbers of an int4 group: 32, 64 or 128; None means 32. Not for int8."""
    activations: Literal["int8"] | None = None
    """int8: products round their input to 8 bits too, a scale per token. Only with int8 weights."""
    as_stored: bool = False
    """Matrices of a GGUF file keep what it has: 4 bits, full precision. Others are int8."""

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights={self.weights!r} is unknown; allowed are int8, int4")
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations={self.activations!r} is unknown; allowed is int8")
        if self.weights == "int8" and self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size}: int8 weights have no groups; leave it out"
            )
        if self.weights == "int4" and self.activations is not None:
            raise ValueError("activations=int8 needs weights=int8; leave it out with int4")
        if self.weights == "int4":
            if self.group_size is None:
                object.__setattr__(self, "group_size", GROUP_SIZE)
            if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
                raise ValueError(f"group_size={self.group_size!r} must be 32, 64 or 128")


# What --quantization of native passes rounds weights to; products with them round the tokens, too.
NATIVE_SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(weights="int8", activations="int8"),
    "int4": Scheme(weights="int4"),
    "gguf": Scheme(weights="int8", activations="int8", as_stored=True),
}
_GRIDS_OF_16 = ("Q4_0", "Q4_1", "Q4_K")  # numbers for each 32 columns


def weight_bits(name: str, shape: Sequence[int], scheme: Scheme) -> Bits | None:
    """Bits of a number of the weight `name` (the model's or the released name); None: it keeps
    full precision.

    Full precision: time conditioning, routers, norms, convolutions, A, D, dt, biases, embeddings.
    Heads have 8 bits or more, and so have matrices whose rows are no whole number of groups.
    """
    if _HEAD.fullmatch(name):
        return 8
    if not _PROJECTION.fullmatch(name):
        return None
    is_whole = scheme.group_size is not None and shape[-1] % scheme.group_size == 0
    return 4 if is_whole else 8


def packed_bits(name: str, shape: Sequence[int], scheme: Scheme, stored: str) -> Bits | None:
    """`weight_bits` of a matrix that a file holds in a GGUF type, or in another precision."""
    bits = weight_bits(name, shape, scheme)
    return stored_bits(name, stored) if bits is not None and scheme.as_stored else bits


def stored_bits(name: str, stored: str) -> Bits | None:
    """What a GGUF type comes to: 4 where int4 of native passes holds it as it is; 8; None: the type
    is no quantised one.
    """
    if stored not in BLOCK_TYPES:
        return None
    return 4 if stored in _GRIDS_OF_16 and not _HEAD.fullmatch(name) else 8


def quantise_modules(model: TwoTower, scheme: Scheme) -> None:
    """Replace every module whose weights `weight_bits` quantises by one without values.

    A head that shares the embeddings' weights keeps full precision with them.
    """
    heads = {"context_lm_head", "lm_head"} if model.config.tie_word_embeddings else set()
    for name, module in list(model.named_modules()):
        found = None if name in heads else _quantised(name, module, scheme)
        if found is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, found)
    model.requires_grad_(False)


def shared_copy(module: M) -> M:
    """The module and all below it anew, with the same weights: what is replaced in it is replaced
    in no other.
    """
    found = copy.copy(module)
    below = module._modules.items()
    found._modules = {name: part and shared_copy(part) for name, part in below}
    return found


def rounded_to_eight_bits(model: TwoTower) -> TwoTower:
    """The model with those full-precision matrices in int8 that a checkpoint would quantise; heads
    too where embeddings share their weights. All else is shared with it.
    """
    found, scheme = shared_copy(model), Scheme(weights="int8")
    for name, module in list(found.named_modules()):
        with torch.device("meta"):
            own = _quantised(name, module, scheme)
        if own is None or any(weight.is_meta for weight in module.parameters()):
            continue
        for part, matrix in own.named_children():
            assert isinstance(matrix, QuantisedMatrix)
            weight = getattr(module, part)
            each = [to_eight_bits(one) for one in weight.view(-1, *weight.shape[-2:])]
            for buffer in ("qdata", "scale"):
                values = torch.stack([getattr(one, buffer) for one in each])
                setattr(matrix, buffer, values.view(getattr(matrix, buffer).shape))
        parent, _, child = name.rpartition(".")
        setattr(found.get_submodule(parent), child, own)
    return found


def _quantised(name: str, module: nn.Module, scheme: Scheme) -> nn.Module | None:
    if isinstance(module, Experts):
        found = {
            part: _matrix(f"{name}.{part}", tuple(weight.shape), scheme)
            for part, weight in module.named_parameters()
        }
        matrices = {part: matrix for part, matrix in found.items() if matrix is not None}
        return QuantisedExperts(**matrices) if len(matrices) == len(found) else None
    if isinstance(module, nn.Linear):
        weight = _matrix(f"{name}.weight", tuple(module.weight.shape), scheme)
        return None if weight is None else QuantisedLinear(weight, module.bias)
    return None


def _matrix(name: str, shape: tuple[int, ...], scheme: Scheme) -> QuantisedMatrix | None:
    bits = weight_bits(name, shape, scheme)
    if bits is None:
        return None
    group_size = scheme.group_size if bits == 4 else None
    return QuantisedMatrix(shape, bits, group_size, scheme.activations is not None)


def scheme_of(model: nn.Module) -> Scheme | None:
    """How a model is quantised; None in full precision."""
    found = [module for module in model.modules() if isinstance(module, QuantisedMatrix)]
    if not found:
        return None
    groups = {matrix.group_size for matrix in found} - {None}
    activations: Literal["int8"] | None = "int8" if found[0].rounds_input else None
    return Scheme(
        weights="int4" if groups else "int8",
        group_size=next(iter(groups), None),
        activations=activations,
    )


def matrix_at(model: nn.Module, name: str) -> QuantisedMatrix:
    """The quantised matrix that stands for the weight `name`."""
    found = model.get_submodule(name)
    assert isinstance(found, QuantisedMatrix)
    return found


def stacks(model: nn.Module) -> list[str]:
    """Names of the stacked expert weights of a model."""
    return [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, Experts | QuantisedExperts)
        for part in ("up_proj", "down_proj", "gate_proj")
        if getattr(module, part) is not None
    ]


def map_experts(model: nn.Module, matrices: Mapping[str, Matrices]) -> None:
    """Let experts take their matrices from elsewhere: by the names of `stacks`."""
    for name in dict.fromkeys(name.rpartition(".")[0] for name in stacks(model)):
        parent, _, child = name.rpartition(".")
        parts = (matrices.get(f"{name}.{part}_proj") for part in ("up", "down", "gate"))
        up, down, gate = parts
        assert up is not None and down is not None
        setattr(model.get_submodule(parent), child, MappedExperts(up, down, gate))
    model.requires_grad_(False)


def has_mapped_experts(model: nn.Module) -> bool:
    """Whether experts are views of files."""
    return any(isinstance(module, MappedExperts) for module in model.modules())


def placement_refusal(
    scheme: Scheme | None, expert_storage: ExpertStorage, devices: Collection[str]
) -> str | None:
    """Why weights of a scheme cannot lie on these devices, in one sentence, or None if they can."""
    elsewhere = [device for device in devices if device.partition(":")[0] != "cpu"]
    for is_bound, what, remedy in (
        (expert_storage == "mmap", "expert_storage='mmap'", "expert_storage='memory'"),
        (
            scheme is not None and scheme.activations is not None,
            "activations=int8",
            "a checkpoint of int8 weights alone",
        ),
    ):
        if is_bound and elsewhere:
            return f"{what} needs both towers on the CPU, not on {elsewhere[0]!r}; use {remedy}"
    return None


def require_plain(model: TwoTower, purpose: str) -> None:
    """ValueError (one line) unless all weights are floating numbers, read or not yet."""
    if scheme_of(model) is not None:
        raise ValueError(
            f"{purpose} needs full-precision weights, and these are quantised; use the checkpoint "
            "that they were made from"
        )
    if has_mapped_experts(model):
        raise ValueError(
            f"{purpose} needs the experts in memory; load with expert_storage='memory'"
        )
