"""What the machine is called, for the head of a measurement."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path


def describe_cpu() -> str:
    """The processor's name and cores as the system gives them, with what tells generations apart:
    servers often say only "AMD EPYC" and differ by half in speed.
    """
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info and "model" in info:
        name += f" (family {info['cpu family']}, model {info['model']})"
    return f"{name}, {os.cpu_count()} cores"


def recorded() -> dict[str, str]:
    """What every record of a measurement names; docs/figures.md shows it beside the figures."""
    return {
        "processor": describe_cpu(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(sys.orig_argv),
    }


def _command(words: list[str]) -> str:
    """A command without this machine's paths: `twotower ...`, `python benchmarks/...`."""
    is_script = len(words) > 1 and Path(words[1]).is_absolute()
    first = [Path(words[1]).name, *words[2:]] if is_script else ["python", *words[1:]]
    return shlex.join(first)


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty on other systems."""
    file = Path("/proc/cpuinfo")
    text = file.read_text().split("\n\n")[0] if file.is_file() else ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
