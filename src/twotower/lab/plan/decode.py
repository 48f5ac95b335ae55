"""Times of the three modes from times of passes: pure arithmetic, and where modes are equal."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from twotower.lab.plan.memory import CHUNK, NEWCOMERS, Placement, block_transfer_bytes
from twotower.lab.plan.passes import Pass, PassTime, Setup, Tower, time_pass
from twotower.lab.plan.workload import Mode, Workload

AR_STEP, DENOISE, EXTEND, VERIFY = "ar_step", "denoise_pass", "extend", "verify"


@dataclass(frozen=True, kw_only=True)
class ModeTime:
    """Seconds of a whole batch: one group of rows in sequence, or two groups that overlap (None
    where there is one device or one row); the faster way counts.
    """

    mode: Mode
    placement: Placement
    prefill_s: float
    first_s: float
    sequence_s: float
    overlapped_s: float | None
    rows: int
    tokens: int

    @property
    def pipelined(self) -> bool:
        return self.overlapped_s is not None and self.overlapped_s < self.sequence_s

    @property
    def decode_s(self) -> float:
        """Of the faster way, without the prompts."""
        if self.overlapped_s is None:
            return self.sequence_s
        return min(self.sequence_s, self.overlapped_s)

    @property
    def tokens_per_s(self) -> float:
        """With the reading of the prompts."""
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


def pass_times(setup: Setup, workload: Workload, placement: Placement) -> dict[str, PassTime]:
    """Each pass that the modes are made of, half-way through the answer, with all rows."""
    size, calls = workload.block_size, {}
    shapes: dict[str, tuple[Tower, int, int]] = {
        AR_STEP: ("context", 1, 1),
        DENOISE: ("denoiser", size, size),
        EXTEND: ("context", size, 0),
        VERIFY: ("context", size, size),
    }
    held = {tower for device in placement.devices for tower in device.towers}
    for name, (tower, tokens, logits) in shapes.items():
        if tower in held:
            call = Pass(
                tower=tower,
                rows=workload.batch,
                tokens=tokens,
                logits=logits,
                past=workload.mean_past,
            )
            calls[name] = time_pass(setup, call, placement.share_of(tower))
    return calls


def time_mode(setup: Setup, workload: Workload, mode: Mode, placement: Placement) -> ModeTime:
    """The mode on that placement, pipelined where two devices gain by it.

    Speculation needs `tokens_per_cycle`.
    """
    prefill_s = prefill_seconds(setup, workload, placement)
    first_s, overlapped_s = prefill_s, None
    if mode == "ar":
        step = pass_times(setup, workload, placement)[AR_STEP].seconds
        sequence_s = (workload.new_tokens - 1) * step
    else:
        whole = turns(setup, workload, mode, placement)
        sequence_s = whole.in_sequence
        if len(placement.devices) > 1 and workload.batch > 1:
            half = replace(workload, batch=-(-workload.batch // 2))
            overlapped_s = pipelined_seconds(turns(setup, half, mode, placement))
        if mode == "diffusion":
            first_s += whole.denoiser_s / whole.cycles
    return ModeTime(
        mode=mode,
        placement=placement,
        prefill_s=prefill_s,
        first_s=first_s,
        sequence_s=sequence_s,
        overlapped_s=overlapped_s,
        rows=workload.batch,
        tokens=workload.batch * workload.new_tokens,
    )


def turns(setup: Setup, workload: Workload, mode: Mode, placement: Placement) -> Turns:
    """An answer of a block mode, split by tower; the link counts as the context tower's."""
    calls = pass_times(setup, workload, placement)
    if mode == "diffusion":
        passes = workload.new_tokens / workload.tokens_per_nfe
        reads, read = float(workload.extensions), calls[EXTEND]
        cycles = workload.new_tokens / workload.block_size
        per_read = float(workload.block_size)
    else:
        assert workload.tokens_per_cycle is not None, "speculation needs tokens per cycle"
        reads = (workload.new_tokens - 1) / workload.tokens_per_cycle
        passes, read, cycles = workload.draft_passes * reads, calls[VERIFY], reads
        per_read = workload.tokens_per_cycle
    moved = _link_seconds(setup, workload, placement, per_read)
    return Turns(
        denoiser_s=passes * calls[DENOISE].seconds,
        context_s=reads * (read.seconds + moved),
        cycles=max(cycles, 1.0),
    )


def pipelined_seconds(group: Turns) -> float:
    """Two equal groups of rows, each device serving them in turns: the busier one is never idle,
    the other's last turn comes on top.
    """
    busier, other = sorted((group.denoiser_s, group.context_s), reverse=True)
    return 2 * busier + other / group.cycles


def prefill_seconds(setup: Setup, workload: Workload, placement: Placement) -> float:
    """Reading all prompts, NEWCOMERS rows at a time, and sending the cache to a second device."""
    share = placement.share_of("context")
    whole, rest = divmod(workload.batch, NEWCOMERS)
    groups = [(NEWCOMERS, whole), (rest, 1)]
    seconds = sum(n * _read_seconds(setup, workload, rows, share) for rows, n in groups if rows * n)
    return seconds + _link_seconds(setup, workload, placement, workload.prompt_tokens)


def _read_seconds(setup: Setup, workload: Workload, rows: int, share: float) -> float:
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
    """Tokens per pass at which diffusion takes `ar_s` in all; None where a whole block per pass
    does not suffice. `reads_s`: all extensions, with the link.
    """
    left = ar_s - reads_s
    needed = workload.new_tokens * denoise_s / left if left > 0 else float("inf")
    return needed if needed <= workload.block_size else None


def break_even_tokens_per_cycle(ar_s: float, cycle_s: float, workload: Workload) -> float | None:
    """Tokens per cycle at which speculation takes `ar_s` in all; None beyond a block."""
    needed = (workload.new_tokens - 1) * cycle_s / ar_s if ar_s > 0 else float("inf")
    return needed if needed <= workload.block_size else None


def bisect_change(low: int, high: int, is_after: Callable[[int], bool]) -> int:
    """The first integer in (low, high] for which it holds, if it holds for high and not for low."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_after(middle) else (middle, high)
    return high


def _link_seconds(setup: Setup, workload: Workload, placement: Placement, tokens: float) -> float:
    """Sending keys of so many new tokens, and the states, to a second device if there is one."""
    if len(placement.devices) == 1:
        return 0.0
    assert setup.hardware.link_gb_s is not None, "two devices need a link"
    moved = block_transfer_bytes(setup.shape, workload.batch, round(tokens), setup.precision)
    return moved / (1e9 * setup.hardware.link_gb_s)
