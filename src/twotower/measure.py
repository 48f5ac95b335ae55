"""What this process may use of the machine."""

import ctypes
import os
import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CPUS = Path("/sys/devices/system/cpu")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation on the device may use; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def usable_cores() -> int:
    """Physical cores that this process may use, at least 1: two hardware threads of a core share
    its arithmetic, and a container may have less of the machine than it sees.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    quota, _, period = (_read(_CPU_QUOTA) or "max").partition(" ")
    most = len(cores) if quota == "max" else round(int(quota) / int(period))
    return max(1, min(len(cores), most))


def _siblings(cpu: int) -> str:
    """The hardware threads of a CPU's core, as Linux writes them."""
    return _read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _read(file: Path) -> str | None:
    return file.read_text().strip() if file.is_file() else None


def release_memory() -> None:
    """Return to the system what the C allocator holds and nobody uses; glibc alone can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
