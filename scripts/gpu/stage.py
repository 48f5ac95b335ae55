"""What the stages on a GPU share: options, a record and its picture on the disk, and times.

They need no installation: PYTHONPATH=src python scripts/gpu/NAME.py, with PyTorch, safetensors,
tokenizers and huggingface_hub. --rehearse runs the same code on a CPU, with tiny sizes.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from picture import Picture, Record, write_whole

from twotower.cli.machine import recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Stage:
    """One command: its options, its device, the time that it has, and its record."""

    def __init__(
        self, name: str, parser: argparse.ArgumentParser, paint: Callable[[Record], "Figure"]
    ) -> None:
        """parser: has the options of this stage alone. paint: a figure of the record, with what it
        shows as its title.
        """
        parser.add_argument("--device", default="cuda", help="cuda, or cpu with --rehearse")
        parser.add_argument("--rehearse", action="store_true", help="run on a CPU with tiny sizes")
        out = Path(f"gpu-{name}.json")
        parser.add_argument("--out", type=Path, default=out, help="file of the JSON record")
        parser.add_argument(
            "--seconds", type=float, default=210.0, help="start no measurement after this time"
        )
        self.args = parser.parse_args()
        self.is_rehearsal: bool = self.args.rehearse
        self.device = torch.device("cpu" if self.is_rehearsal else self.args.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            parser.error("--device: this PyTorch sees no CUDA device; use --rehearse for a CPU")
        self._began = time.monotonic()
        self.record: dict[str, Any] = {"stage": name, "machine": self._machine(), "results": []}
        self._take_up()
        self._picture = Picture(self.args.out.with_suffix(".png"), paint)

    @property
    def results(self) -> list[dict[str, Any]]:
        """What has been found, in the order of the finding; also by an earlier run."""
        found: list[dict[str, Any]] = self.record["results"]
        return found

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() - self._began > self.args.seconds

    def has(self, **values: object) -> bool:
        """Whether some result has all of these values: an earlier run has done that part."""
        return any(values.items() <= result.items() for result in self.results)

    def add(self, **result: object) -> None:
        """One more result, on the disk and as a line. Ends the process where a failure has taken
        the device from it: all that followed would fail, too.
        """
        self.results.append(result)
        self.save()
        print(json.dumps(result), flush=True)
        if "failed" in result:
            try:
                sync(self.device)
            except RuntimeError:
                self._picture.renew(self.record, is_forced=True)
                raise SystemExit(
                    "the device is lost; the same command goes on behind this"
                ) from None

    def close(self, **more: object) -> None:
        """Write the record, and its picture as it is at the end."""
        self.save(**more)
        self._picture.renew(self.record, is_forced=True)

    def save(self, **more: object) -> None:
        """Write the record, whole or not at all; now and then its picture."""
        self.record |= more
        self.record["seconds"] = round(time.monotonic() - self._began, 1)
        write_whole(self.args.out, (json.dumps(self.record, indent=1) + "\n").encode())
        self._picture.renew(self.record)

    def _machine(self) -> dict[str, str]:
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_gpu else "none (rehearsal on a CPU)"
        return recorded() | {
            "gpu": name, "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip

    def _take_up(self) -> None:
        """Go on with the record of an earlier run on the same machine."""
        if self.args.out.is_file():
            earlier = json.loads(self.args.out.read_text())
            same = ("gpu", "torch")
            if all(earlier["machine"][key] == self.record["machine"][key] for key in same):
                self.record["results"] = earlier["results"]


def sync(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_ms(
    call: Callable[[], object], repeats: int, device: torch.device, num_passes: int = 1
) -> dict[str, float]:
    """Milliseconds of a pass, of which a call makes num_passes: median, least and most of some
    repeats, after two that warm up.
    """
    found = []
    for repeat in range(repeats + 2):
        sync(device)
        start = time.perf_counter()
        call()
        sync(device)
        if repeat >= 2:
            found.append((time.perf_counter() - start) * 1e3 / num_passes)
    values = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return {name: round(value, 4) for name, value in values.items()}


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
