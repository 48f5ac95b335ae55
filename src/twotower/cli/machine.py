"""What the machine is called, for the head of a measurement."""

import os
import platform
from pathlib import Path


def describe_cpu() -> str:
    """The processor's name and number of cores as the system gives them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"
