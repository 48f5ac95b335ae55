"""Times of the three modes from times of passes, by batch; where modes are equally fast.

Pure arithmetic on what `passes` and `memory` say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from twotower.lab.plan.inputs import MODES, Mode, Workload
from twotower.lab.plan.memory import CHUNK, NEWCOMERS, DeviceMap, cache_bytes, device_maps
from twotower.lab.plan.passes import (
    AR_STEP,
    DENOISE,
    EXTEND,
    VERIFY,
    Pass,
    PassTime,
    PlanSetup,
    call_shapes,
    time_pass,
)


@dataclass(frozen=True, kw_only=True)
class ModeTime:
    """Seconds of a whole batch: one group of rows in sequence, or two groups that overlap (None
    where there is one device or one row); the faster way counts.
    """

    mode: Mode
    device_map: DeviceMap
    prefill_s: float
    first_s: float
    sequence_s: float
    overlapped_s: float | None
    rows: int
    tokens: int

    @property
    def overlapped(self) -> bool:
        return self.overlapped_s is not None and self.overlapped_s < self.sequence_s

    @property
    def decode_s(self) -> float:
        """Of the faster way, without the prompts."""
        if self.overlapped_s is None:
            return self.sequence_s
        return min(self.sequence_s, self.overlapped_s)

    @property
    def tokens_per_s(self) -> float:
        """With the prefill."""
        return self.tokens / (self.prefill_s + self.decode_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Without it; AR's and speculation's first token comes with the prompt."""
        return self.tokens / self.decode_s if self.decode_s else float("inf")


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Seconds that an answer's batch spends in the denoiser, in the context tower and on the link,
    and the number of times it goes from one to the other.
    """

    denoiser_s: float
    context_s: float
    cycles: float

    @property
    def in_sequence(self) -> float:
        return self.denoiser_s + self.context_s


def pass_times(setup: PlanSetup, workload: Workload, device_map: DeviceMap) -> dict[str, PassTime]:
    """Each pass that the modes are made of, half-way through the answer, with all rows."""
    calls = {}
    held = {tower for device in device_map.devices for tower in device.towers}
    for name, (tower, tokens, logits) in call_shapes(workload.block_size).items():
        if tower in held:
            call = Pass(
                tower=tower,
                rows=workload.batch_size,
                tokens=tokens,
                logits=logits,
                past=workload.mean_past,
            )
            calls[name] = time_pass(setup, call, device_map.share_of(tower))
    return calls


def time_mode(setup: PlanSetup, workload: Workload, mode: Mode, device_map: DeviceMap) -> ModeTime:
    """The mode on that device map, overlapped where two devices gain by it.

    Its tokens per pass or cycle must be known.
    """
    prefill_s = prefill_seconds(setup, workload, device_map)
    first_s, overlapped_s = prefill_s, None
    if mode == "ar":
        step = pass_times(setup, workload, device_map)[AR_STEP].seconds
        sequence_s = (workload.new_tokens - 1) * step
    else:
        whole = turns(setup, workload, mode, device_map)
        sequence_s = whole.in_sequence
        if len(device_map.devices) > 1 and workload.batch_size > 1:
            half = replace(workload, batch_size=-(-workload.batch_size // 2))
            overlapped_s = overlapped_seconds(turns(setup, half, mode, device_map))
        if mode == "diffusion":
            first_s += whole.denoiser_s / whole.cycles
    return ModeTime(
        mode=mode,
        device_map=device_map,
        prefill_s=prefill_s,
        first_s=first_s,
        sequence_s=sequence_s,
        overlapped_s=overlapped_s,
        rows=workload.batch_size,
        tokens=workload.batch_size * workload.new_tokens,
    )


def turns(setup: PlanSetup, workload: Workload, mode: Mode, device_map: DeviceMap) -> Turns:
    """An answer of a block mode, split by tower; the link counts as the context tower's."""
    calls, per_turn = pass_times(setup, workload, device_map), workload.yield_of(mode)
    assert per_turn is not None, "block modes need tokens per pass or cycle"
    if mode == "diffusion":
        passes = workload.new_tokens / per_turn
        reads, read = float(workload.extensions), calls[EXTEND]
        cycles = workload.new_tokens / workload.block_size
        per_read = float(workload.block_size)
    else:
        reads = (workload.new_tokens - 1) / per_turn
        passes, read, cycles = workload.draft_passes * reads, calls[VERIFY], reads
        per_read = per_turn
    moved = _link_seconds(setup, workload, device_map, per_read)
    return Turns(
        denoiser_s=passes * calls[DENOISE].seconds,
        context_s=reads * (read.seconds + moved),
        cycles=max(cycles, 1.0),
    )


def overlapped_seconds(group: Turns) -> float:
    """Two groups of rows in turns: the busier device is never idle; the other's last turn."""
    busier, other = sorted((group.denoiser_s, group.context_s), reverse=True)
    return 2 * busier + other / group.cycles


def prefill_seconds(setup: PlanSetup, workload: Workload, device_map: DeviceMap) -> float:
    """Prefill of all prompts, NEWCOMERS rows at a time; the cache is sent to a second device."""
    share = device_map.share_of("context")
    whole, rest = divmod(workload.batch_size, NEWCOMERS)
    groups = [(NEWCOMERS, whole), (rest, 1)]
    seconds = sum(n * _read_seconds(setup, workload, rows, share) for rows, n in groups if rows * n)
    return seconds + _link_seconds(setup, workload, device_map, workload.prompt_tokens)


def _read_seconds(setup: PlanSetup, workload: Workload, rows: int, share: float) -> float:
    """Prompts of so many rows, a chunk of each in a pass; the last pass makes their logits."""
    seconds, length = 0.0, workload.prompt_tokens
    for past in range(0, length, CHUNK):
        tokens, is_last = min(CHUNK, length - past), past + CHUNK >= length
        call = Pass(tower="context", rows=rows, tokens=tokens, logits=int(is_last), past=past)
        seconds += time_pass(setup, call, share).seconds
    return seconds


def break_even_tokens_per_nfe(
    ar_s: float, denoise_s: float, reads_s: float, workload: Workload
) -> float | None:
    """Tokens per pass at which diffusion, `reads_s` included, takes `ar_s`; None beyond a block."""
    left = ar_s - reads_s
    needed = workload.new_tokens * denoise_s / left if left > 0 else float("inf")
    return needed if needed <= workload.block_size else None


def break_even_tokens_per_cycle(ar_s: float, cycle_s: float, workload: Workload) -> float | None:
    """Tokens per cycle at which speculation takes `ar_s` in all; None beyond a block."""
    needed = (workload.new_tokens - 1) * cycle_s / ar_s if ar_s > 0 else float("inf")
    return needed if needed <= workload.block_size else None


def _link_seconds(
    setup: PlanSetup, workload: Workload, device_map: DeviceMap, tokens: float
) -> float:
    """Sending keys of so many new tokens, and the states, to a second device if there is one."""
    if len(device_map.devices) == 1:
        return 0.0
    assert setup.hardware.link_gb_s is not None, "two devices need a link"
    moved = cache_bytes(setup.shape, workload.batch_size, round(tokens), setup.widths)
    return moved / (1e9 * setup.hardware.link_gb_s)


# The fastest of each mode; None: nothing fits, or its tokens per pass or cycle are not known.
Best = Mapping[Mode, ModeTime | None]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Batch sizes, `first` to `last`, at which `winner` writes the most tokens a second."""

    first: int
    last: int
    winner: Mode


def all_times(setup: PlanSetup, workload: Workload, mode: Mode, num_devices: int) -> list[ModeTime]:
    """The mode on every device_map that fits, fastest first; none without a known yield."""
    if workload.yield_of(mode) is None:
        return []
    fitting = [p for p in device_maps(setup, workload, mode, num_devices) if p.fits]
    times = [time_mode(setup, workload, mode, device_map) for device_map in fitting]
    return sorted(times, key=lambda time: time.prefill_s + time.decode_s)


def best_times(setup: PlanSetup, workload: Workload, num_devices: int) -> Best:
    """Each mode on its fastest device_map."""
    found = {mode: all_times(setup, workload, mode, num_devices) for mode in MODES}
    return {mode: times[0] if times else None for mode, times in found.items()}


def nearest_misfit(setup: PlanSetup, workload: Workload, mode: Mode, num_devices: int) -> DeviceMap:
    """The device_map that lacks the least memory, to say what is missing."""
    return min(device_maps(setup, workload, mode, num_devices), key=_lacking)


def _lacking(device_map: DeviceMap) -> float:
    over = sum(max(0.0, device.total - device.usable) for device in device_map.devices)
    return over + max(0.0, device_map.host_bytes - device_map.host_room)


def sweep(
    setup: PlanSetup, workload: Workload, num_devices: int, max_batch_size: int
) -> dict[int, Best]:
    """At most 1, 2, 4, ... rows at a time, as long as any mode fits.

    Where more rows would only push experts out of the device, a mode stays at fewer: the others
    wait.
    """
    points: dict[int, Best] = {}
    best: Best = dict.fromkeys(MODES)
    batch = 1
    while batch <= max_batch_size:
        times = best_times(setup, replace(workload, batch_size=batch), num_devices)
        if not any(times.values()):
            break
        best = {mode: _faster(times[mode], best[mode]) for mode in MODES}
        points[batch] = best
        batch *= 2
    return points


def faster_mode(points: Mapping[int, Best], per_device: bool) -> list[Span]:
    """Which of AR and diffusion is faster at which of the batch sizes.

    Where one does not fit and the other does, that one is. `per_device` compares what a device
    yields: AR on two devices is two replicas.
    """
    spans: list[Span] = []
    for batch_size, times in points.items():
        mode = _winner(times, per_device)
        if spans and spans[-1].winner == mode:
            spans[-1] = replace(spans[-1], last=batch_size)
        else:
            spans.append(Span(first=batch_size, last=batch_size, winner=mode))
    return spans


def _faster(one: ModeTime | None, other: ModeTime | None) -> ModeTime | None:
    found = [time for time in (one, other) if time is not None]
    return max(found, key=lambda time: time.tokens_per_s, default=None)


def _winner(times: Best, per_device: bool) -> Mode:
    def speed(time: ModeTime | None) -> float:
        if time is None:
            return 0.0
        return time.tokens_per_s / (len(time.device_map.devices) if per_device else 1)

    return "diffusion" if speed(times["diffusion"]) > speed(times["ar"]) else "ar"
