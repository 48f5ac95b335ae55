"""How many cores this process may use."""

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
