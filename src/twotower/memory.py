"""How much memory this process may use, and how it returns what it does not."""

import ctypes
import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation on the device may use; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    with _MEMINFO.open("rb") as lines:  # asked for each prompt: no more of it is read than needed
        found = next((line for line in lines if line.startswith(b"MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def release_memory() -> None:
    """Return to the system what the C allocator holds and nobody uses; glibc alone can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
