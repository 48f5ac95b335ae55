"""The denoiser behind a link: the context rank's model, and the loop of the denoiser rank.

One message asks for a block: how the batch's rows have changed since the last, what the context
tower has read, the block, and how to fill it. The answer is the block after each of its steps.
"""

import dataclasses
import itertools
import json
import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twotower.diffusion import PER_ROW, Sampler, Step
from twotower.engine.denoiser import Blocks, Denoiser, denoise_rows
from twotower.engine.denoiser_copy import CacheCopy, Follower
from twotower.engine.row import Row
from twotower.hosts.link import END, Link, Message, PeerLostError
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model import ContextCache, ContextView, TwoTower
from twotower.model.delta import CacheDelta
from twotower.model.state import empty_states
from twotower.model.view import LayerState

_log = logging.getLogger(__name__)
_STEP_TENSORS = [
    field.name for field in dataclasses.fields(Step) if field.name not in ("index", "others")
]


class SplitTwoTower(TwoTower):
    """A context tower here; blocks are denoised by the rank at the other end of the link."""

    def __init__(self, model: TwoTower, link: Link) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._client = DenoiserClient(link)

    @property
    def has_denoiser(self) -> bool:
        """It has, though not here."""
        return True

    def new_denoiser(self) -> Denoiser:
        """See `engine.blocks.new_denoiser`."""
        return RemoteDenoiser(self._client)

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        raise ValueError(
            "mode=mock-ar moves the whole cache per token; load both towers in one process for it"
        )

    def close(self) -> None:
        """Tell the denoiser rank that there is no more work, and it ends; log what travelled."""
        _log.info("line %s", json.dumps(self._client.figures()))
        self._client.link.close()


class DenoiserClient:
    """Requests to the denoiser rank, and what went over the link; shared by all denoisers."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.numbers = itertools.count()
        self.dropped: list[int] = []  # denoisers whose batches have ended
        self._num_blocks, self._waited_s = 0, 0.0

    def request(self, message: Message) -> Message:
        """Send a block to fill; returns the answer. ValueError if it is a refusal."""
        start = time.monotonic()
        self.link.send(message)
        answer = self.link.receive()
        if answer.kind == END:
            raise PeerLostError("the denoiser rank has ended; start both ranks again")
        self._num_blocks += 1
        self._waited_s += time.monotonic() - start
        if answer.kind == "error":
            raise ValueError(f"the denoiser rank: {answer.values['message']}")
        return answer

    def figures(self) -> dict[str, float]:
        """Blocks so far, and per block: bytes there and back, milliseconds until its answer."""
        count = max(self._num_blocks, 1)
        return {
            "blocks": self._num_blocks,
            "bytes_sent_per_block": self.link.bytes_sent / count,
            "bytes_received_per_block": self.link.bytes_received / count,
            "ms_per_block": round(1e3 * self._waited_s / count, 2),
        }


class RemoteDenoiser:
    """The denoiser rank's copy of a batch's cache, by number; see `engine.denoiser.Denoiser`."""

    def __init__(self, client: DenoiserClient) -> None:
        self._client, self._number = client, next(client.numbers)
        self._follower = Follower()
        weakref.finalize(self, client.dropped.append, self._number)

    def fill(self, rows: Sequence[Row], cache: ContextCache, blocks: Blocks) -> Iterator[Step]:
        tokens, sampler, generators, slots = blocks
        sources, delta = self._follower.lacks(rows, cache)
        states = [generator.get_state() for generator in generators if sampler.is_random]
        parts = [_delta_tensors(delta), _sampler_tensors(sampler), [tokens], states]
        dropped = [self._client.dropped.pop() for _ in range(len(self._client.dropped))]
        values = {
            "number": self._number,
            "dropped": dropped,
            "sources": sources,
            "counts": delta.counts.tolist(),
            "layers": [_name_of(state) for state in delta.states],
            "slots": None if slots is None else slots.tolist(),
            "sampler": _sampler_values(sampler),
            "tensors": [len(part) for part in parts],
        }
        answer = self._client.request(Message("fill", values, [t for part in parts for t in part]))
        self._follower.holds(rows, cache)
        for generator, state in zip(generators, answer.tensors[: len(states)], strict=False):
            generator.set_state(state)
        yield from _steps_of(answer.values["steps"], answer.tensors[len(states) :])


def serve_blocks(model: TwoTower, link: Link) -> int:
    """Fill blocks until the context rank says that it is done; returns how many.

    model: its denoiser tower is used alone. PeerLostError if the context rank goes without a word.
    A block that cannot be filled is answered with the reason and ends nothing.
    """
    copies: dict[int, CacheCopy] = {}
    num_blocks = 0
    while (asked := link.receive()).kind != END:
        try:
            answer = _fill(model, copies, asked)
        except Exception as error:
            _log.exception("a block failed")
            answer = Message("error", {"message": " ".join(str(error).split())})
        link.send(answer)
        num_blocks += 1
    link.close()
    return num_blocks


def _fill(model: TwoTower, copies: dict[int, CacheCopy], asked: Message) -> Message:
    """Bring the copy up to date, fill the block; the answer."""
    values, tensors = asked.values, iter(asked.tensors)
    of_delta, of_sampler, (blocks,), states = (
        list(itertools.islice(tensors, count)) for count in values["tensors"]
    )
    for number in values["dropped"]:
        copies.pop(number, None)
    delta = _delta_of(values["layers"], of_delta, values["counts"])
    # The other rank may compute or keep keys in half precision, and this one not.
    device, dtype = model.denoiser_device, torch.promote_types(delta.hidden.dtype, model.dtype)
    kept = next((s.k.dtype for s in delta.states if isinstance(s, KV)), model.kv_dtype)
    kv_dtype = torch.promote_types(kept, model.kv_dtype)
    delta, copy = delta.to(device, dtype, kv_dtype), copies.get(values["number"])
    if copy is None:
        empty = empty_states(model.config.context.layers, 1, device, dtype, kv_dtype)
        copy = copies[values["number"]] = CacheCopy(ContextCache(empty, 1))
    copy.update(values["sources"], delta)
    generators = [torch.Generator() for _ in states]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    slots = None if values["slots"] is None else torch.tensor(values["slots"])
    per_row: dict[str, Any] = dict(zip(PER_ROW, of_sampler, strict=True))
    sampler = Sampler(**values["sampler"], **per_row)
    asked_blocks = Blocks(blocks, sampler, generators, slots)
    steps = list(denoise_rows(model, copy.cache.view(), asked_blocks))
    drawn = [generator.get_state() for generator in generators]
    of_steps = [getattr(step, name) for step in steps for name in _STEP_TENSORS]
    return Message("block", {"steps": len(steps)}, [*drawn, *of_steps])


def _sampler_tensors(sampler: Sampler) -> list[Tensor]:
    return [getattr(sampler, name) for name in PER_ROW]


def _sampler_values(sampler: Sampler) -> dict[str, object]:
    names = [field.name for field in dataclasses.fields(sampler) if field.name not in PER_ROW]
    values = {name: getattr(sampler, name) for name in names}
    return values | {"num_others": 0}  # they do not travel


def _name_of(state: LayerState) -> str | None:
    return None if state is None else "kv" if isinstance(state, KV) else "mamba"


def _delta_tensors(delta: CacheDelta) -> list[Tensor]:
    return [delta.hidden, *(part for state in delta.states if state is not None for part in state)]


def _delta_of(layers: list[str | None], tensors: list[Tensor], counts: list[int]) -> CacheDelta:
    hidden, *parts = tensors
    left = iter(parts)
    makes: dict[str, type[KV | MambaState]] = {"kv": KV, "mamba": MambaState}
    states: list[LayerState] = [
        None if layer is None else makes[layer](next(left), next(left)) for layer in layers
    ]
    return CacheDelta(states, hidden, torch.tensor(counts, dtype=torch.int64))


def _steps_of(count: int, tensors: Sequence[Tensor]) -> Iterator[Step]:
    width = len(_STEP_TENSORS)
    for index in range(count):
        own = tensors[index * width : (index + 1) * width]
        yield Step(index=index, **dict(zip(_STEP_TENSORS, own, strict=True)))  # type: ignore[arg-type]
