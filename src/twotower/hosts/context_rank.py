"""The context rank's model: its denoiser sits behind a link.

What happens to a batch (rows leave, others join, text is read) is noted and told with the next
block, in one message; the answer is the block with its steps.
"""

import dataclasses
import itertools
import json
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from twotower.diffusion import BlockSampler, Step
from twotower.engine.seat import Seat
from twotower.hosts.link import END, Link, Message, PeerLostError
from twotower.hosts.wire import bundled, delta_to_message, steps_of
from twotower.model import ContextCache, ContextView, TwoTower

_log = logging.getLogger(__name__)


class ApartTwoTower(TwoTower):
    """A context tower here; blocks are denoised by the rank at the other end of the link."""

    def __init__(self, model: TwoTower, link: Link) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._line = Line(link)

    @property
    def has_denoiser(self) -> bool:
        """It has, though not here."""
        return True

    def seat(self) -> Seat:
        """A seat at the denoiser rank; see `engine.seat.take_seat`."""
        return self._line.new_seat()

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        raise ValueError(
            "mode=mock-ar moves the whole cache per token; load both towers in one process for it"
        )

    def close(self) -> None:
        """Tell the denoiser rank that there is no more work, and it ends; log what travelled."""
        _log.info("line %s", json.dumps(self._line.figures()))
        self._line.close()


class Line:
    """The link with the notes that wait for the next block, shared by all seats."""

    def __init__(self, link: Link) -> None:
        self._num_blocks, self._waited_s = 0, 0.0
        self._link = link
        self._notes: list[Message] = []
        self._lock = threading.Lock()  # two queues: one thread notes while the other fills
        self._ids = itertools.count()

    def new_seat(self) -> "RemoteSeat":
        seat = RemoteSeat(self, next(self._ids))
        weakref.finalize(seat, self.note, Message("drop", {"seat": seat.id}))
        return seat

    def note(self, message: Message) -> None:
        """Tell the other rank before the next block."""
        with self._lock:
            self._notes.append(message)

    def ask(self, message: Message) -> Message:
        """Send all notes and a block to fill; returns the answer. ValueError if it is a refusal."""
        with self._lock:
            notes, self._notes = self._notes, []
        start = time.monotonic()
        self._link.send(bundled([*notes, message]))
        answer = self._link.receive()
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
            "bytes_sent_per_block": self._link.bytes_sent / count,
            "bytes_received_per_block": self._link.bytes_received / count,
            "ms_per_block": round(1e3 * self._waited_s / count, 2),
        }

    def close(self) -> None:
        """No more blocks will be asked for."""
        self._link.close()


class RemoteSeat:
    """A batch's rows at the denoiser rank, by number; see `engine.seat.Seat`."""

    def __init__(self, line: Line, number: int) -> None:
        self.id = number
        self._line = line
        self._held: Tensor | None = None  # (B,) tokens of each row that the other rank has

    def follow(self, cache: ContextCache) -> None:
        held = torch.zeros_like(cache.lengths) if self._held is None else self._held
        if self._held is None or not torch.equal(held, cache.lengths):
            self._line.note(delta_to_message(self.id, cache.delta_since(held)))
            self._held = cache.lengths

    def part(self, places: Tensor) -> "RemoteSeat":
        seat = self._line.new_seat()
        if self._held is not None:
            seat._held = self._held[places]
            values = {"seat": seat.id, "of": self.id, "places": places.tolist()}
            self._line.note(Message("part", values))
        return seat

    def join(self, cache: ContextCache, other: Seat, others: ContextCache) -> "RemoteSeat":
        assert isinstance(other, RemoteSeat)
        seat = self._line.new_seat()
        if self._held is not None or other._held is not None:
            self.follow(cache)
            other.follow(others)
            seat._held = torch.cat([cache.lengths, others.lengths])
            self._line.note(Message("join", {"seat": seat.id, "of": [self.id, other.id]}))
        return seat

    def fill(
        self,
        rows: Tensor | None,
        blocks: Tensor,
        samplers: Sequence[BlockSampler],
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        values = {
            "seat": self.id,
            "rows": None if rows is None else rows.tolist(),
            "samplers": [dataclasses.asdict(sampler) for sampler in samplers],
        }
        is_random = any(sampler.is_random for sampler in samplers)
        drawn = [generator.get_state() for generator in generators] if is_random else []
        answer = self._line.ask(Message("fill", values, [blocks, *drawn]))
        for generator, state in zip(generators, answer.tensors[: len(drawn)], strict=False):
            generator.set_state(state)
        yield from steps_of(answer.values["steps"], answer.tensors[len(drawn) :])
