"""Messages between two ranks of torch.distributed: a kind, plain values and tensors.

Built on gloo, which runs everywhere: tensors of a CUDA device travel through host memory. While a
rank works it sends signs of life, so that silence longer than the timeout means a lost peer.
"""

import atexit
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.engine.faults import HopelessError

_FIRST_BYTES = 4096  # the first frame: small messages need no second one
_SIGNS_PER_TIMEOUT = 4
_SIGN_OF_LIFE = "alive"


@dataclass(frozen=True)
class Message:
    """values: what JSON can hold. tensors: of any dtype and shape, on the CPU when received."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)


class PeerLostError(HopelessError):
    """The other rank has gone, or was silent for too long: nothing can be decoded any more."""


class Link:
    """This rank's end of the line; `send` from any thread, `receive` from one at a time.

    timeout_s: longest silence. bytes_sent and bytes_received count what went through the line.
    """

    def __init__(self, peer: int, timeout_s: float) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._peer = peer
        self._timeout_s = timeout_s
        self._sending = threading.Lock()
        self._is_closed = threading.Event()
        self._signs = threading.Thread(target=self._send_signs, name="signs of life", daemon=True)
        self._signs.start()

    def send(self, message: Message) -> None:
        """Send a message; PeerLostError if the peer has gone."""
        data = _packed(message)
        first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
        first[:8] = torch.tensor([len(data)], dtype=torch.int64).view(torch.uint8)
        head = data[: _FIRST_BYTES - 8]
        first[8 : 8 + len(head)] = head
        with self._sending, self._watched("sending to"):
            dist.send(first, self._peer)
            if len(rest := data[len(head) :]):
                dist.send(rest, self._peer)
            self.bytes_sent += len(first) + len(rest)

    def receive(self) -> Message:
        """The next message that is no sign of life; PeerLostError if none comes in time."""
        while True:
            first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
            with self._watched("waiting for"):
                dist.recv(first, self._peer)
                length = int(first[:8].view(torch.int64))
                head = first[8 : 8 + length]
                rest = torch.empty(length - len(head), dtype=torch.uint8)
                if len(rest):
                    dist.recv(rest, self._peer)
            self.bytes_received += len(first) + len(rest)
            message = _unpacked(torch.cat([head, rest]))
            if message.kind != _SIGN_OF_LIFE:
                return message

    def close(self) -> None:
        """Stop the signs of life."""
        self._is_closed.set()
        self._signs.join()

    def _send_signs(self) -> None:
        while not self._is_closed.wait(self._timeout_s / _SIGNS_PER_TIMEOUT):
            try:
                self.send(Message(_SIGN_OF_LIFE))
            except PeerLostError:
                return  # who sends or receives next will notice too

    @contextmanager
    def _watched(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PeerLostError(
                f"lost the other rank while {doing} it (silent for {self._timeout_s:.0f} s, or "
                f"gone): {reason}; start both ranks again"
            ) from None


def join_ranks(timeout_s: float) -> int:
    """Join the process group that torchrun's environment describes; returns this process's rank.

    ValueError (one line) if there is none, or not two ranks.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "towers=apart needs two processes, and this one is alone; start them with torchrun, as "
            "docs/hosts.md shows, or use towers=together"
        )
    if (num_ranks := int(os.environ["WORLD_SIZE"])) != 2:
        raise ValueError(
            f"towers=apart has torchrun's {num_ranks} processes; it needs 2, one for each tower"
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    atexit.register(dist.destroy_process_group)
    return dist.get_rank()


def _packed(message: Message) -> Tensor:
    """Length of the description (8 bytes), the description in JSON, the tensors' bytes."""
    tensors = [tensor.detach().cpu().contiguous() for tensor in message.tensors]
    specs = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    text = json.dumps([message.kind, message.values, specs]).encode()
    head = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    return torch.cat([head, *(t.flatten().view(torch.uint8) for t in tensors if t.numel())])


def _unpacked(data: Tensor) -> Message:
    end = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
    kind, values, specs = json.loads(bytes(data[8:end].tolist()))
    tensors = []
    for name, shape in specs:
        dtype: torch.dtype = getattr(torch, name)
        size = math.prod(shape) * dtype.itemsize
        tensors.append(data[end : end + size].clone().view(dtype).view(shape))  # aligned anew
        end += size
    return Message(kind, values, tensors)
