"""Messages between two ranks of torch.distributed: a kind, plain values and tensors.

Built on gloo, which runs everywhere: tensors of a CUDA device travel through host memory. Each rank
has a thread that sends heartbeats and one that receives, whatever the rank is busy with: a send
takes until the other side receives, and silence longer than the timeout means a lost peer.
"""

import atexit
import contextlib
import json
import math
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.engine.faults import EngineDeadError

END = "end"  # the last message each way: who receives it first answers with it
_FIRST_BYTES = 4096  # the first frame: small messages need no second one
_FRAME_BYTES = 2**24  # of the others: each must arrive within the timeout, on a slow line as well
_BEATS_PER_TIMEOUT = 4
_HEARTBEAT = "heartbeat"


@dataclass(frozen=True)
class Message:
    """values: what JSON can hold. tensors: of any dtype and shape, on the CPU when received."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)


class PeerLostError(EngineDeadError):
    """The other rank has gone, or was silent for too long: nothing can be decoded any more."""


class Link:
    """This rank's end of the line; `send` and `receive` from any thread. Closed at exit at last.

    timeout_s: longest silence. bytes_sent and bytes_received count what went through the line.
    """

    def __init__(self, peer: int, timeout_s: float) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._peer = peer
        self._timeout = timedelta(seconds=timeout_s)
        self._sending, self._ending = threading.Lock(), threading.Lock()
        self._is_closed = threading.Event()
        self._received: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._receiver = threading.Thread(target=self._receive_all, name="receiver", daemon=True)
        self._heart = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)
        self._receiver.start()
        self._heart.start()
        atexit.register(self.close)

    def send(self, message: Message) -> None:
        """Send a message; PeerLostError if the peer has gone."""
        data = _packed(message)
        first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
        first[:8] = torch.tensor([len(data)], dtype=torch.int64).view(torch.uint8)
        head = data[: _FIRST_BYTES - 8]
        first[8 : 8 + len(head)] = head
        with self._sending, self._watched("sending to"):
            if self._is_closed.is_set() and message.kind != END:  # nobody receives after it
                raise PeerLostError("it has ended")
            for frame in (first, *_frames(data[len(head) :])):
                self._wait(dist.isend(frame, self._peer))
                self.bytes_sent += len(frame)

    def receive(self) -> Message:
        """The next message, `END` when either rank has closed; PeerLostError without the peer."""
        received = self._received.get()
        if isinstance(received, Exception) or received.kind == END:
            self._received.put(received)  # for whoever asks next
        if isinstance(received, Exception):
            raise received
        return received

    def close(self) -> None:
        """Say that no more will be sent, and wait until the peer knows it, or is lost."""
        self._end()
        self._heart.join()
        self._receiver.join(self._timeout.total_seconds())

    def _end(self) -> None:
        """Send `END`, once."""
        with self._ending:
            is_first = not self._is_closed.is_set()
            self._is_closed.set()
        if is_first and self._receiver.is_alive():
            with contextlib.suppress(PeerLostError):
                self.send(Message(END))

    def _receive_all(self) -> None:
        """Receive until the end."""
        kind = ""
        while kind != END:
            try:
                message = self._read()
            except (RuntimeError, ValueError) as error:  # lost, or a message that is none
                self._received.put(error)
                return
            if (kind := message.kind) != _HEARTBEAT:
                self._received.put(message)
        self._end()

    def _read(self) -> Message:
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        with self._watched("waiting for"):
            self._wait(dist.irecv(first, self._peer))
            length = int(first[:8].view(torch.int64))
            head = first[8 : 8 + length]
            rest = torch.empty(length - len(head), dtype=torch.uint8)
            for frame in _frames(rest):
                self._wait(dist.irecv(frame, self._peer))
        self.bytes_received += len(first) + len(rest)
        return _unpacked(torch.cat([head, rest]))

    def _wait(self, work: dist.Work | None) -> None:
        assert work is not None  # None is for processes outside the group
        work.wait(self._timeout)

    def _send_heartbeats(self) -> None:
        while not self._is_closed.wait(self._timeout.total_seconds() / _BEATS_PER_TIMEOUT):
            try:
                self.send(Message(_HEARTBEAT))
            except PeerLostError:
                return  # who sends or receives next will notice too

    @contextmanager
    def _watched(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            seconds = self._timeout.total_seconds()
            raise PeerLostError(
                f"lost the other rank while {doing} it (silent for {seconds:.0f} s, or "
                f"gone): {reason}; start both ranks again"
            ) from None


def join_ranks(timeout_s: float) -> int:
    """Join the process group that torchrun's environment describes; returns this process's rank.

    timeout_s: how long to wait for the other rank to start. ValueError (one line) if there is no
    group, or not one of two ranks; PeerLostError if the other does not come.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "denoiser_device=peer: needs two processes, and this one is alone; start them with "
            "torchrun, as docs/hosts.md shows, or name a device of this machine"
        )
    if (num_ranks := int(os.environ["WORLD_SIZE"])) != 2:
        raise ValueError(
            f"denoiser_device=peer: torchrun started {num_ranks} processes; start 2, one for each "
            "tower"
        )
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerLostError(
            f"the other rank did not start within {timeout_s:.0f} s: {reason}; start both with the "
            "same --master-addr and --master-port"
        ) from None
    atexit.register(dist.destroy_process_group)
    return dist.get_rank()


def _frames(data: Tensor) -> tuple[Tensor, ...]:
    """Views of what does not fit the first frame."""
    return data.split(_FRAME_BYTES) if len(data) else ()


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
