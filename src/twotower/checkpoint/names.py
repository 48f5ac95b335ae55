"""Tensor names of the files against parameter names of the model: the only place that knows both.

Two towers are recognised by their names; a single tower's names are its family's business. All are
translated to the released two-tower names first; from there only the stacked experts differ from
the model's own. Source: system.md section 3.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from twotower.families import Family

T = TypeVar("T")
TWO_TOWER = "two-tower"
BARE = "without a prefix"  # a base model, as the class of `transformers` without a head saves it

CONTEXT_PARTS = ("context_tower.", "context_lm_head.")
DENOISER_PARTS = (
    "denoiser_tower.",
    "lm_head.",
    "bigram.",
    "t_embedder.",
    "t_block.",
    "scale_shift_tables.",
)
HEADS = {
    "context_lm_head.weight": "context_tower.embeddings.weight",
    "lm_head.weight": "denoiser_tower.embeddings.weight",
}
_STACKED = re.compile(r"(.*\.mixer\.experts)\.(up_proj|down_proj|gate_proj)")
# Two of them in one tensor, the rows of the first before those of the second in each matrix.
_BOTH = re.compile(r"(.*\.mixer\.experts)\.gate_up_proj")
# What stands for one quantised weight, after its name.
_PARTS = re.compile(r"(.*)(\.(?:qdata|scale|zero))")
_ROUTER = (".mixer.gate.weight", ".mixer.gate.e_score_correction_bias")


class Slot(NamedTuple):
    """Where one released tensor belongs: a parameter, or one expert's slice of a stacked one."""

    parameter: str
    expert: int | None
    shape: tuple[int, ...]

    @property
    def weight(self) -> str:
        """The weight that the parameter is, or a quantised part of."""
        return split_part(self.parameter)[0]


def is_router(name: str) -> bool:
    """Whether a tensor belongs to a router: those stay float32, whatever the model's dtype."""
    return name.endswith(_ROUTER)


def split_part(name: str) -> tuple[str, str]:
    """A tensor's name as the weight's and what follows for one of its quantised parts, or ""."""
    match = _PARTS.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def keeps_dtype(name: str) -> bool:
    """Whether a tensor has a dtype of its own, whatever the model's: routers, quantised parts."""
    return is_router(name) or split_part(name)[1] != ""


def layout_of(names: Iterable[str], family: Family) -> str | None:
    """The layout that a checkpoint's tensor names show, or None for another kind of model."""
    found = set(names)
    if any(name.startswith(("context_tower.", "denoiser_tower.")) for name in found):
        return TWO_TOWER
    for prefix, layout in family.LAYOUTS.items():
        if any(name.startswith(prefix) for name in found):
            return layout
    return BARE if "embeddings.weight" in map(family.to_tower_name, found) else None


def released_name(name: str, layout: str, family: Family) -> str | None:
    """A file's tensor name in two-tower spelling; None if the model has no use for the tensor."""
    if layout == TWO_TOWER:
        return name
    inner = family.to_tower_name(name)
    if inner is None:
        return None
    return f"context_{inner}" if inner.startswith("lm_head.") else f"context_tower.{inner}"


def is_in_backbone(name: str, family: Family, is_tied: bool) -> bool:
    """Whether a single tower's file has a tensor: the context tower's, but for a tied head."""
    return name.startswith(CONTEXT_PARTS) and not (is_tied and family.TIES_HEAD and name in HEADS)


def inner_name(name: str) -> str:
    """A context tensor's name inside its tower."""
    return name.removeprefix("context_tower.").removeprefix("context_")


def released_slots(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Every released tensor of a model, given its parameters' and buffers' shapes."""
    slots: dict[str, Slot] = {}
    for name, shape in shapes.items():
        weight, part = split_part(name)
        if match := _STACKED.fullmatch(weight):
            for expert in range(shape[0]):
                released = f"{match[1]}.{expert}.{match[2]}.weight{part}"
                slots[released] = Slot(name, expert, shape[1:])
        else:
            slots[name] = Slot(name, None, shape)
    return slots


def with_tied_heads(entries: Mapping[str, T]) -> dict[str, T]:
    """The entries of a tied checkpoint, which may leave out a head or the embeddings it equals."""
    twins = HEADS | {source: head for head, source in HEADS.items()}
    found = {name: entries[twin] for name, twin in twins.items() if twin in entries}
    return found | dict(entries)


def halves(name: str) -> tuple[str, ...]:
    """The two names of what a tensor of experts holds as halves; none for any other tensor."""
    match = _BOTH.fullmatch(name)
    return (f"{match[1]}.gate_proj", f"{match[1]}.up_proj") if match else ()


def is_stacked(name: str) -> bool:
    """Whether a name is that of a layer's experts in one tensor, as `transformers` keeps them."""
    return _STACKED.fullmatch(name) is not None
