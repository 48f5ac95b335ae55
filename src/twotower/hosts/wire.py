"""Engine records as messages and back; nothing here talks to anyone."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from twotower.diffusion import Step
from twotower.hosts.link import Message
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.state import CacheDelta, LayerState

_STEP_TENSORS = [field.name for field in dataclasses.fields(Step) if field.name != "index"]


def delta_to_message(seat: int, delta: CacheDelta) -> Message:
    """What the context tower has read, for a seat."""
    kinds = ["kv" if isinstance(s, KV) else "mamba" if s else None for s in delta.states]
    tensors = [part for state in delta.states if state is not None for part in state]
    values = {"seat": seat, "counts": delta.counts.tolist(), "kinds": kinds}
    return Message("delta", values, [delta.hidden, *tensors])


def message_to_delta(message: Message) -> CacheDelta:
    """The inverse of `delta_to_message`."""
    hidden, *parts = message.tensors
    left = iter(parts)
    states = [_state(kind, left) for kind in message.values["kinds"]]
    return CacheDelta(states, hidden, torch.tensor(message.values["counts"], dtype=torch.int64))


def _state(kind: str | None, tensors: Iterator[Tensor]) -> LayerState:
    if kind is None:
        return None
    make = KV if kind == "kv" else MambaState
    return make(next(tensors), next(tensors))


def steps_to_tensors(steps: Sequence[Step]) -> list[Tensor]:
    """All tensors of the steps, in the order of the fields."""
    return [getattr(step, name) for step in steps for name in _STEP_TENSORS]


def steps_of(count: int, tensors: Sequence[Tensor]) -> Iterator[Step]:
    """The inverse of `steps_to_tensors`."""
    width = len(_STEP_TENSORS)
    for index in range(count):
        own = tensors[index * width : (index + 1) * width]
        yield Step(index=index, **dict(zip(_STEP_TENSORS, own, strict=True)))


def bundled(messages: Sequence[Message]) -> Message:
    """Several messages as one: their tensors one after another."""
    parts = [[one.kind, one.values, len(one.tensors)] for one in messages]
    return Message("bundle", {"parts": parts}, [t for one in messages for t in one.tensors])


def parts_of(bundle: Message) -> Iterator[Message]:
    """The messages that were bundled into one."""
    start = 0
    for kind, values, count in bundle.values["parts"]:
        yield Message(kind, values, bundle.tensors[start : start + count])
        start += count
