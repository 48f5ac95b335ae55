"""How much memory this process may use, and how it returns what it does not."""

import ctypes
import math
import os
import re
import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device, enough: float = math.inf) -> int | None:
    """Memory that an allocation may use, or enough of it; None where the system does not tell."""
    if device.type == "cuda":
        # What PyTorch has taken and does not use is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu" or sys.platform != "linux":
        return None
    # Each prompt asks, and the file takes a hundred times as long. It counts caches of files, too.
    unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if unused >= enough:
        return unused
    return _told("MemAvailable")


def _told(name: str) -> int | None:
    """Bytes that Linux tells under a name; None where it does not."""
    if not _MEMINFO.is_file():
        return None
    found = re.search(rf"^{name}: *(\d+) kB$".encode(), _MEMINFO.read_bytes(), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def lacking_room(device: torch.device, needed: int) -> str | None:
    """What weights need on a device and what is free; None where it is enough, swap included."""
    free = available_bytes(device, needed)
    if free is None or needed <= free:
        return None
    free += (_told("SwapFree") or 0) if device.type == "cpu" else 0
    if needed <= free:
        return None
    return f"about {needed / 1e9:.1f} GB of memory on {device}, where {free / 1e9:.1f} GB are free"


def lacking_memory(device: torch.device, token_bytes: int, num_tokens: int) -> str | None:
    """What a device's cache of so many tokens needs and what is free; None where it is enough."""
    # Buffers have room for up to half as many more rows, and a grown one is a copy.
    needed = 2 * num_tokens * token_bytes
    free = available_bytes(device, needed)
    if free is None or needed <= free:
        return None
    return f"about {needed / 1e9:.1f} GB of cache and {free / 1e9:.1f} GB are free"


def release_memory() -> None:
    """Return to the system what the C allocator holds and nobody uses; glibc alone can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
