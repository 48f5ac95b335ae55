"""Speed by batch, and between which batches which mode is the faster one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from twotower.lab.plan.decode import ModeTime, bisect_change, time_mode
from twotower.lab.plan.memory import Placement, placements
from twotower.lab.plan.passes import Setup
from twotower.lab.plan.workload import MODES, Mode, Workload


@dataclass(frozen=True, kw_only=True)
class Point:
    """The fastest that each mode can be with at most `batch` rows at a time; None: nothing fits."""

    batch: int
    times: Mapping[Mode, ModeTime | None]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows at a time, `first` to `last`, at which `winner` writes the most tokens a second, of all
    devices that it uses or per device.
    """

    first: int
    last: int
    winner: Mode


def all_times(setup: Setup, workload: Workload, mode: Mode, num_devices: int) -> list[ModeTime]:
    """The mode on every placement that fits, fastest first; speculation needs tokens per cycle."""
    if mode == "speculative" and workload.tokens_per_cycle is None:
        return []
    fitting = [p for p in placements(setup, workload, mode, num_devices) if p.fits]
    times = [time_mode(setup, workload, mode, placement) for placement in fitting]
    return sorted(times, key=lambda time: time.prefill_s + time.decode_s)


def best_times(setup: Setup, workload: Workload, num_devices: int) -> dict[Mode, ModeTime | None]:
    """Each mode on its fastest placement; None where nothing fits."""
    found = {mode: all_times(setup, workload, mode, num_devices) for mode in MODES}
    return {mode: times[0] if times else None for mode, times in found.items()}


def nearest_misfit(setup: Setup, workload: Workload, mode: Mode, num_devices: int) -> Placement:
    """The placement that lacks the least memory, to say what is missing."""
    return min(placements(setup, workload, mode, num_devices), key=_lacking)


def _lacking(placement: Placement) -> float:
    over = sum(max(0.0, device.total - device.usable) for device in placement.devices)
    return over + max(0.0, placement.host_bytes - placement.host_room)


def sweep(setup: Setup, workload: Workload, num_devices: int, max_batch: int) -> list[Point]:
    """At most 1, 2, 4, ... rows at a time, as long as any mode fits.

    Where more rows would only push experts out of the device, a mode stays at fewer: the others
    wait.
    """
    points: list[Point] = []
    batch = 1
    while batch <= max_batch:
        times = best_times(setup, replace(workload, batch=batch), num_devices)
        if not any(times.values()):
            break
        if points:
            times = {mode: _faster(times[mode], points[-1].times[mode]) for mode in MODES}
        points.append(Point(batch=batch, times=times))
        batch *= 2
    return points


def block_spans(
    setup: Setup, workload: Workload, num_devices: int, points: Sequence[Point], per_device: bool
) -> list[Span]:
    """Which of AR and diffusion is faster from how many rows to how many, each change exactly.

    Where one does not fit and the other does, that one is the winner. `per_device` compares what a
    device yields: AR on two devices is two replicas.
    """
    spans: list[Span] = []
    for before, point in zip([None, *points], points, strict=False):
        mode = _winner(point.times, per_device)
        if before is None or not spans:
            spans.append(Span(first=point.batch, last=point.batch, winner=mode))
        elif mode == spans[-1].winner:
            spans[-1] = replace(spans[-1], last=point.batch)
        else:
            is_after = _change(setup, workload, num_devices, before, per_device)
            start = bisect_change(before.batch, point.batch, is_after)
            spans[-1] = replace(spans[-1], last=start - 1)
            spans.append(Span(first=start, last=point.batch, winner=mode))
    return spans


def _change(
    setup: Setup, workload: Workload, num_devices: int, before: Point, per_device: bool
) -> Callable[[int], bool]:
    """Whether so many rows have another winner than that point."""

    def is_after(batch: int) -> bool:
        times = best_times(setup, replace(workload, batch=batch), num_devices)
        kept = {mode: _faster(times[mode], before.times[mode]) for mode in MODES}
        return _winner(kept, per_device) != _winner(before.times, per_device)

    return is_after


def _faster(one: ModeTime | None, other: ModeTime | None) -> ModeTime | None:
    found = [time for time in (one, other) if time is not None]
    return max(found, key=lambda time: time.tokens_per_s, default=None)


def _winner(times: Mapping[Mode, ModeTime | None], per_device: bool) -> Mode:
    def speed(time: ModeTime | None) -> float:
        if time is None:
            return 0.0
        return time.tokens_per_s / (len(time.placement.devices) if per_device else 1)

    return "diffusion" if speed(times["diffusion"]) > speed(times["ar"]) else "ar"
