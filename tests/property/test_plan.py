"""What must hold for every machine and workload that can be planned for."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tiny_plan import machine, setup, workload
from twotower.lab.plan.inputs import BITS, MODES, Efficiency, Workload, uniform
from twotower.lab.plan.memory import cache_bytes, device_maps, tower_bytes
from twotower.lab.plan.modes import (
    DENOISE,
    break_even_tokens_per_nfe,
    overlapped_seconds,
    pass_times,
    time_mode,
    turns,
)
from twotower.lab.plan.passes import Pass, PlanSetup, expected_experts, pass_parts, time_pass

SHARES = st.floats(0.05, 1.0)
EFFICIENCIES = st.builds(
    Efficiency, bandwidth=SHARES, arithmetic=SHARES, layer_s=st.floats(0, 1e-3)
)
MACHINES = st.builds(
    lambda bandwidth, rate: machine(
        bandwidth_gb_s=bandwidth, tflops={"bfloat16": rate}, link_gb_s=1.0
    ),
    st.floats(0.1, 1e4),
    st.floats(1e-4, 1e3),
)
SETUPS = st.builds(setup, MACHINES, EFFICIENCIES)
CALLS = st.builds(
    Pass,
    tower=st.sampled_from(["context", "denoiser"]),
    rows=st.integers(1, 64),
    tokens=st.integers(1, 16),
    logits=st.integers(0, 1),
    past=st.integers(0, 1000),
)
WORKLOADS = st.builds(
    lambda batch, prompt, new, per_nfe, per_cycle: workload(
        batch_size=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        tokens_per_nfe=per_nfe,
        tokens_per_cycle=per_cycle,
    ),
    st.integers(1, 40),
    st.integers(1, 2000),
    st.integers(2, 200),
    st.floats(0.5, 4.0),
    st.floats(1.0, 4.0),
)


@given(st.integers(1, 512), st.data())
def test_experts_grow_towards_all_of_them(total: int, data: st.DataObject) -> None:
    """Silent failure: more experts than there are, or fewer than one token needs."""
    chosen = data.draw(st.integers(1, total))
    tokens = data.draw(st.integers(1, 5000))
    found = expected_experts(total, chosen, tokens)
    assert chosen * (1 - 1e-9) <= found <= min(total, chosen * tokens) * (1 + 1e-9)
    assert found <= expected_experts(total, chosen, tokens + 1) * (1 + 1e-12)


@given(SETUPS, CALLS)
def test_a_pass_takes_at_least_what_each_limit_says(made: PlanSetup, call: Pass) -> None:
    """Silent failure: a part that is counted in neither limit, and speeds beyond the hardware."""
    parts = pass_parts(made.shape, call, made.widths)
    found = time_pass(made, call)
    bandwidth = 1e9 * made.hardware.bandwidth_gb_s * made.efficiency.bandwidth
    peak = 1e12 * made.hardware.tflops["bfloat16"] * made.efficiency.arithmetic
    streamed = sum(p.weight_bytes + p.cache_bytes for p in parts) / bandwidth
    computed = sum(p.operations for p in parts) / peak
    least = max(streamed, computed) + found.overhead_s
    assert least * (1 - 1e-9) <= found.seconds <= (streamed + computed + found.overhead_s) * 1.001


@given(SETUPS, CALLS)
def test_more_work_never_takes_less_time(made: PlanSetup, call: Pass) -> None:
    """Silent failure: a batch or a longer text that makes a pass faster."""
    now = time_pass(made, call).seconds
    for name in ("rows", "tokens", "past"):
        more = replace(call, **{name: getattr(call, name) + 1})
        assert time_pass(made, more).seconds >= now, name
    # And a row of a larger batch costs no more than one of a smaller.
    double = replace(call, rows=2 * call.rows)
    assert time_pass(made, double).seconds <= 2 * now * (1 + 1e-9)


@given(SETUPS, CALLS, st.floats(1.0, 10.0))
def test_better_hardware_is_never_slower(made: PlanSetup, call: Pass, factor: float) -> None:
    now, hardware = time_pass(made, call).seconds, made.hardware
    wider = replace(hardware, bandwidth_gb_s=factor * hardware.bandwidth_gb_s)
    rates = {name: factor * rate for name, rate in hardware.tflops.items()}
    for better in (wider, replace(hardware, tflops=rates)):
        assert time_pass(replace(made, hardware=better), call).seconds <= now


@given(SETUPS, CALLS)
def test_fewer_bits_are_never_slower_nor_larger(made: PlanSetup, call: Pass) -> None:
    """Silent failure: scales, or a part at the wrong width, that make int4 larger than int8."""
    widths = sorted(BITS, key=lambda width: -BITS[width])
    setups = [replace(made, widths=uniform(width)) for width in widths]  # type: ignore[arg-type]  # names of BITS
    times = [time_pass(one, call).seconds for one in setups]
    sizes = [sum(tower_bytes(made.shape, "denoiser", one.widths)) for one in setups]
    caches = [cache_bytes(made.shape, 3, 50, one.widths) for one in setups]
    for falling in (times, sizes, caches):
        assert falling == sorted(falling, reverse=True)


@given(SETUPS, WORKLOADS)
def test_at_break_even_the_modes_are_level(made: PlanSetup, work: Workload) -> None:
    """Silent failure: a break-even that, put in, is none."""
    (ar_place,) = device_maps(made, work, "ar", 1)
    (place,) = device_maps(made, work, "diffusion", 1)
    ar_s = time_mode(made, work, "ar", ar_place).decode_s
    calls, reads_s = pass_times(made, work, place), turns(made, work, "diffusion", place).context_s
    needed = break_even_tokens_per_nfe(ar_s, calls[DENOISE].seconds, reads_s, work)
    if needed is None:
        best = replace(work, tokens_per_nfe=float(work.block_size))
        assert time_mode(made, best, "diffusion", place).decode_s > ar_s * (1 - 1e-9)
    else:
        level = time_mode(made, replace(work, tokens_per_nfe=needed), "diffusion", place)
        assert abs(level.decode_s - ar_s) <= 1e-6 * ar_s


@given(SETUPS, WORKLOADS)
def test_overlap_is_bounded_by_the_work(made: PlanSetup, work: Workload) -> None:
    """Silent failure: two devices that do more than twice the work of one."""
    for mode in ("diffusion", "speculative"):
        *_, place = device_maps(made, work, mode, 2)  # type: ignore[arg-type]  # of the modes
        whole = turns(made, work, mode, place)  # type: ignore[arg-type]
        found = time_mode(made, work, mode, place)  # type: ignore[arg-type]
        assert found.decode_s <= whole.in_sequence * (1 + 1e-9)
        half = turns(made, replace(work, batch_size=-(-work.batch_size // 2)), mode, place)  # type: ignore[arg-type]
        assert overlapped_seconds(half) >= half.in_sequence * (1 - 1e-9)


@given(SETUPS, WORKLOADS)
def test_speeds_and_memory_grow_with_what_is_asked(made: PlanSetup, work: Workload) -> None:
    """Silent failure: more tokens per pass that slow diffusion, or more rows that need less."""
    (place,) = device_maps(made, work, "diffusion", 1)
    slow, fast = replace(work, tokens_per_nfe=1.0), replace(work, tokens_per_nfe=4.0)
    speeds = [time_mode(made, w, "diffusion", place).tokens_per_s for w in (slow, work, fast)]
    assert speeds[0] <= speeds[2] and speeds[1] <= speeds[2] * (1 + 1e-9)
    for mode in MODES:
        (one,) = device_maps(made, work, mode, 1)
        (more,) = device_maps(made, replace(work, batch_size=work.batch_size + 1), mode, 1)
        assert more.devices[0].total > one.devices[0].total
