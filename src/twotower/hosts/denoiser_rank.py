"""The denoiser rank: keeps a copy of each batch's cache and fills the blocks that it is sent."""

import logging
from collections.abc import Callable

import torch

from twotower.diffusion import BlockSampler
from twotower.engine.seat import denoise_rows
from twotower.hosts.link import END, Link, Message
from twotower.hosts.wire import message_to_delta, parts_of, steps_to_tensors
from twotower.model import ContextCache, TwoTower

_log = logging.getLogger(__name__)


def serve_blocks(model: TwoTower, link: Link) -> int:
    """Fill blocks until the context rank says that it is done; returns how many.

    model: its denoiser tower is used alone. PeerLostError if the context rank goes without a word.
    A block that cannot be filled is answered with the reason and ends nothing.
    """
    seats = _Seats(model)
    num_blocks = 0
    while (bundle := link.receive()).kind != END:
        try:
            answer = seats.take(bundle)
        except Exception as error:  # also what a lost note leads to
            _log.exception("a block failed")
            answer = Message("error", {"message": " ".join(str(error).split())})
        link.send(answer)
        num_blocks += 1
    link.close()
    return num_blocks


class _Seats:
    """The caches of the batches that the context rank works on, by number."""

    def __init__(self, model: TwoTower) -> None:
        self._model = model
        self._caches: dict[int, ContextCache] = {}
        self._notes: dict[str, Callable[[Message], None]] = {
            "delta": self._delta,
            "part": self._part,
            "join": self._join,
            "drop": self._drop,
        }

    def take(self, bundle: Message) -> Message:
        """Do what the notes say, then fill the block; the answer."""
        *notes, block = parts_of(bundle)
        for note in notes:
            self._notes[note.kind](note)
        return self._fill(block)

    def _delta(self, note: Message) -> None:
        delta, number = message_to_delta(note), note.values["seat"]
        if number not in self._caches:
            self._caches[number] = ContextCache(
                self._model.config.context,
                len(delta.counts),
                self._model.denoiser_device,
                delta.hidden.dtype,
            )
        self._caches[number].apply_delta(delta.to(self._model.denoiser_device))

    def _part(self, note: Message) -> None:
        places = torch.tensor(note.values["places"], dtype=torch.int64)
        self._caches[note.values["seat"]] = self._caches[note.values["of"]].select(places)

    def _join(self, note: Message) -> None:
        one, two = (self._caches[number] for number in note.values["of"])
        self._caches[note.values["seat"]] = one.concat(two)

    def _drop(self, note: Message) -> None:
        self._caches.pop(note.values["seat"], None)

    def _fill(self, block: Message) -> Message:
        values = block.values
        blocks, *states = block.tensors
        generators = [torch.Generator() for _ in states]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        rows = None if values["rows"] is None else torch.tensor(values["rows"], dtype=torch.int64)
        samplers = [BlockSampler(**sampler) for sampler in values["samplers"]]
        view = self._caches[values["seat"]].view()
        steps = list(denoise_rows(self._model, view, rows, blocks, samplers, generators))
        drawn = [generator.get_state() for generator in generators]
        return Message("block", {"steps": len(steps)}, [*drawn, *steps_to_tensors(steps)])
