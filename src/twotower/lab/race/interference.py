"""Did something else disturb the timing: other processes, swapping, throttling?

Reads the counters of Linux before and after; where the system has none, nothing is claimed.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

STAT, VMSTAT, CPUINFO = Path("/proc/stat"), Path("/proc/vmstat"), Path("/proc/cpuinfo")
CGROUP_STATS = (Path("/sys/fs/cgroup/cpu.stat"), Path("/sys/fs/cgroup/cpu/cpu.stat"))
MOST_OTHER, MOST_STOLEN = 0.05, 0.02  # cores, on average
LEAST_CLOCK = 0.9  # of the clock before
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Counters at one moment; None where the system does not tell."""

    wall_s: float
    own_s: float  # processor seconds of this process, all threads
    busy_s: float | None  # processor seconds of all processes, all cores
    stolen_s: float | None  # taken by the virtual machine's host
    swapped_pages: int | None
    throttled_periods: int | None
    clock_mhz: float | None


def take_snapshot() -> Snapshot:
    """The counters now."""
    busy_s, stolen_s = parse_stat(_read(STAT))
    return Snapshot(
        wall_s=time.perf_counter(),
        own_s=time.process_time(),
        busy_s=busy_s,
        stolen_s=stolen_s,
        swapped_pages=parse_swapped(_read(VMSTAT)),
        throttled_periods=parse_throttled("\n".join(map(_read, CGROUP_STATS))),
        clock_mhz=parse_clock(_read(CPUINFO)),
    )


def parse_stat(text: str) -> tuple[float | None, float | None]:
    """Busy and stolen seconds since the start, from the `cpu` line of /proc/stat.

    Its fields: user, nice, system, idle, iowait, irq, softirq, steal, ... in ticks.
    """
    line = next((line for line in text.splitlines() if line.startswith("cpu ")), None)
    if line is None:
        return None, None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S, steal / _TICKS_PER_S


def parse_swapped(text: str) -> int | None:
    """Pages swapped in and out since the start."""
    found = re.findall(r"^pswp(?:in|out) (\d+)$", text, flags=re.MULTILINE)
    return sum(map(int, found)) if found else None


def parse_throttled(text: str) -> int | None:
    """Periods in which a group's quota stopped us."""
    found = re.findall(r"^nr_throttled (\d+)$", text, flags=re.MULTILINE)
    return sum(map(int, found)) if found else None


def parse_clock(text: str) -> float | None:
    """The slowest core's clock in MHz."""
    found = re.findall(r"^cpu MHz\s*: ([\d.]+)$", text, flags=re.MULTILINE)
    return min(map(float, found)) if found else None


def other_cores(before: Snapshot, after: Snapshot) -> float | None:
    """Cores that other processes kept busy between two snapshots, on average."""
    if before.busy_s is None or after.busy_s is None or after.wall_s <= before.wall_s:
        return None
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, others / (after.wall_s - before.wall_s))


def disturbances(before: Snapshot, after: Snapshot, during: str) -> list[str]:
    """A line for each thing that makes the timings between two snapshots doubtful."""
    found = []
    others = other_cores(before, after)
    if others is not None and others > MOST_OTHER:
        found.append(
            f"{during}: other processes used {others:.2f} cores; timings of several threads suffer "
            "most, measure again on an idle machine"
        )
    if before.stolen_s is not None and after.stolen_s is not None:
        stolen = (after.stolen_s - before.stolen_s) / max(after.wall_s - before.wall_s, 1e-9)
        if stolen > MOST_STOLEN:
            found.append(f"{during}: the host took {stolen:.2f} cores away from this machine")
    if _grew(before.swapped_pages, after.swapped_pages):
        found.append(f"{during}: memory was swapped; free some or take a smaller size")
    if _grew(before.throttled_periods, after.throttled_periods):
        found.append(f"{during}: a CPU quota throttled the run; raise it")
    if (
        before.clock_mhz is not None
        and after.clock_mhz is not None
        and after.clock_mhz < LEAST_CLOCK * before.clock_mhz
    ):
        found.append(
            f"{during}: the clock fell from {before.clock_mhz:.0f} to {after.clock_mhz:.0f} MHz"
        )
    return found


def watch_idle(seconds: float = 1.0) -> list[str]:
    """What others do while we do nothing: the machine's state before the race."""
    before = take_snapshot()
    time.sleep(seconds)
    return disturbances(before, take_snapshot(), "before the race")


def _grew(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after > before


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
