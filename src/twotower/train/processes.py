"""The processes of one training run: which this is, what all agree on, how they end.

Decides how they meet (torchrun's environment), how an error becomes everybody's, and what a lost
process, Ctrl-C and SIGTERM mean. What of the model a process holds is `parallel`'s matter. What
they say to each other is text and numbers, never pickled objects.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from twotower.checkpoint import find_device

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# How gloo, NCCL and the store that all meet at say that somebody is not there any more.
_LOST = re.compile(r"gloo|nccl|peer|socket|connection|timed out|timeout|store", re.IGNORECASE)


class SharedError(ValueError):
    """An error of the user that all processes have found; one line of the first is enough."""


class LostProcess(RuntimeError):
    """Another process of the run has ended or does not answer within the timeout."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """All processes of a run, seen from number `rank`; a run without torchrun is one process."""

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None  # None when there is one process
    device: str | None = None  # this process's own; None: what the options say

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own_rows(self, start: int, count: int) -> range:
        """This process's of `count` rows that start at number `start`."""
        first, stop = (count * n // self.count for n in (self.rank, self.rank + 1))
        return range(start + first, start + stop)

    def add(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, in place; a tensor on the CPU."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true for at least one process."""
        return flag if self.count == 1 else bool(self.add(torch.tensor(float(flag))) > 0)

    def share(self, text: str | None, source: int = 0) -> str | None:
        """The text that process `source` has, on every process."""
        if self.count == 1:
            return text
        data = b"" if text is None else text.encode()
        length = torch.tensor(-1 if text is None else len(data))
        dist.broadcast(length, src=source)
        if length < 0:
            return None
        box = torch.tensor([*data] if self.rank == source else [0] * int(length), dtype=torch.uint8)
        dist.broadcast(box, src=source)
        return bytes(box.tolist()).decode()

    def together(self, action: Callable[[], T]) -> T:
        """`action()` on every process; a ValueError or OSError of one is raised by all."""
        if self.count == 1:
            return action()
        made, failure = None, None
        try:
            made = action()
        except (ValueError, OSError) as error:
            failure = " ".join(str(error).split())
        failed = self.add(torch.eye(self.count)[self.rank] * float(failure is not None))
        if failed.any():
            raise SharedError(self.share(failure, source=int(failed.argmax())))
        return made  # type: ignore[return-value]  # what `action` made, as none has failed

    def on_first(self, make: Callable[[], T]) -> T | None:
        """`make()` on the first process, None on the others; its error is raised on all."""
        return self.together(lambda: make() if self.is_first else None)

    def add_number(self, value: float) -> float:
        """The sum of all processes' numbers; of one process, the number itself."""
        return (
            value if self.count == 1 else self.add(torch.tensor(value, dtype=torch.float64)).item()
        )

    def error(self, text: str) -> ValueError:
        """An error that all processes raise."""
        return ValueError(text) if self.count == 1 else SharedError(text)

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        self.any(False)


ALONE = Processes()


@contextmanager
def joined(device: str, timeout_s: int) -> Iterator[Processes]:
    """The processes that torchrun started with this one; `ALONE` without it or with one process.

    device: cpu or cuda, where each process takes the GPU of its number on the host. While entered,
    a lost peer raises LostProcess after `timeout_s` seconds at most. ValueError (one line) for a
    device that is not there.
    """
    given = find_device(device)
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    kind, own = given.type, _own_device(given)
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:nccl"
    with _lost_peers_named():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        rank, count = dist.get_rank(), dist.get_world_size()
        if count == 1:
            yield Processes(device=own)
        else:
            mesh = init_device_mesh(kind, (count,))
            yield Processes(rank=rank, count=count, mesh=mesh, device=own)
    dist.destroy_process_group()


def _own_device(given: torch.device) -> str:
    """cpu, or the GPU with this process's number on its host."""
    if given.type == "cpu":
        return "cpu"
    if given.index is not None:
        raise ValueError(
            f"device: {given} names one device for all processes; give {given.type}, and each "
            "takes its own"
        )
    own = str(find_device(f"{given.type}:{dist.get_node_local_rank()}"))
    torch.get_device_module(own).set_device(torch.device(own))
    return own


@contextmanager
def _lost_peers_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).strip().split("\n")[0]
        if not isinstance(error, dist.DistError) and not _LOST.search(first_line):
            raise
        reason = re.sub(r"^\[[^]]*\] ", "", first_line).split(". ")[0]  # without their source line
        raise LostProcess(
            f"another process of the run was lost ({reason[:160]}); run the same command again to "
            "go on from the last checkpoint"
        ) from error


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`: the step is finished, saved
    and the run stops. A second one acts at once, but not under torchrun, which passes a terminal's
    Ctrl-C on a second time.
    """

    def __init__(self, is_patient: bool = False) -> None:
        """is_patient: further signals change nothing."""
        self.requested = False
        self._is_patient = is_patient
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._previous = {s: signal.signal(s, self._request) for s in _SIGNALS}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._is_patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._previous = {}

    def __exit__(self, *error: object) -> None:
        self._restore()
