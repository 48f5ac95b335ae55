"""Times of the modes from times of passes. Where every pass takes 6 ms, all can be counted."""

from dataclasses import replace

import pytest

from tiny_plan import machine, setup, workload
from twotower.lab.plan.inputs import Efficiency, Mode, Workload
from twotower.lab.plan.memory import DeviceMap, device_maps
from twotower.lab.plan.modes import (
    EXTEND,
    Turns,
    all_times,
    best_times,
    break_even_tokens_per_cycle,
    break_even_tokens_per_nfe,
    faster_mode,
    overlapped_seconds,
    pass_times,
    sweep,
    time_mode,
    turns,
)
from twotower.lab.plan.passes import PlanSetup

# A machine so fast that only the six layers' overhead is left: 6 ms a pass.
FAST = machine(bandwidth_gb_s=1e9, tflops={"bfloat16": 1e6}, link_gb_s=1e9)
STEADY = Efficiency(bandwidth=1.0, arithmetic=1.0, layer_s=1e-3)
MS = 1e-3


def placed(made: PlanSetup, work: Workload, mode: Mode, devices: int = 1) -> DeviceMap:
    *_, last = device_maps(made, work, mode, devices)
    return last


def test_an_answer_token_by_token() -> None:
    """The prompt's pass yields the first of 16 tokens."""
    made, work = setup(FAST, STEADY), workload()
    found = time_mode(made, work, "ar", placed(made, work, "ar"))
    assert found.prefill_s == pytest.approx(6 * MS) and found.first_s == found.prefill_s
    assert found.decode_s == pytest.approx(15 * 6 * MS)
    assert found.tokens_per_s == pytest.approx(16 / (16 * 6 * MS))
    assert found.decode_tokens_per_s == pytest.approx(16 / (15 * 6 * MS))


def test_an_answer_in_blocks() -> None:
    """16 tokens, two a pass: 8 passes; four blocks, of which the last is not read back."""
    made, work = setup(FAST, STEADY), workload()
    found = time_mode(made, work, "diffusion", placed(made, work, "diffusion"))
    assert found.decode_s == pytest.approx((8 + 3) * 6 * MS)
    assert found.first_s == pytest.approx((1 + 2) * 6 * MS)  # prompt, then a block's passes
    assert [workload(new_tokens=n).extensions for n in (1, 4, 5, 16, 17)] == [0, 0, 1, 3, 4]


def test_an_answer_by_drafts() -> None:
    """15 tokens after the prompt's own, three a cycle: 5 cycles of a draft and a verification."""
    made, work = setup(FAST, STEADY), workload(tokens_per_cycle=3.0)
    place = placed(made, work, "speculative")
    assert time_mode(made, work, "speculative", place).decode_s == pytest.approx(5 * 2 * 6 * MS)
    twice = replace(work, draft_passes=2)
    assert time_mode(made, twice, "speculative", place).decode_s == pytest.approx(5 * 3 * 6 * MS)


def test_long_prompts_take_several_passes_and_rows_share_them() -> None:
    made = setup(FAST, STEADY)
    for prompt, batch, passes in ((512, 1, 1), (513, 1, 2), (512, 16, 1), (600, 17, 4), (1, 9, 1)):
        work = workload(prompt_tokens=prompt, batch_size=batch)
        found = time_mode(made, work, "ar", placed(made, work, "ar"))
        assert found.prefill_s == pytest.approx(passes * 6 * MS, rel=1e-3), (prompt, batch)


def test_two_groups_of_rows_overlap() -> None:
    """30 s of the denoiser and 10 of the context tower a group: the denoiser is never idle."""
    assert overlapped_seconds(Turns(denoiser_s=30, context_s=10, cycles=5)) == 60 + 10 / 5
    assert overlapped_seconds(Turns(denoiser_s=10, context_s=30, cycles=5)) == 60 + 10 / 5
    assert Turns(denoiser_s=30, context_s=10, cycles=5).in_sequence == 40


def test_overlap_is_used_where_it_gains() -> None:
    """Passes of the same length for all rows and for half: a draft and its verification gain
    nothing from being halved, so only what is shorter for fewer rows does. One row has no second
    group.
    """
    steady = setup(FAST, STEADY)
    work = workload(batch_size=8, tokens_per_cycle=4.0)
    found = time_mode(steady, work, "speculative", placed(steady, work, "speculative", 2))
    assert not found.overlapped and found.decode_s == pytest.approx(15 / 4 * 12 * MS)
    # All arithmetic: half of the rows take half of the time, and two devices share the work.
    busy = setup(machine(bandwidth_gb_s=1e9, link_gb_s=1e9))
    place = placed(busy, work, "speculative", 2)
    found = time_mode(busy, work, "speculative", place)
    whole = turns(busy, work, "speculative", place).in_sequence
    assert found.overlapped and whole / 2 < found.decode_s < 0.7 * whole
    assert found.sequence_s == pytest.approx(whole) and found.overlapped_s == found.decode_s
    alone = replace(work, batch_size=1)
    assert time_mode(busy, alone, "speculative", place).overlapped_s is None
    near = placed(busy, work, "speculative", 1)
    assert time_mode(busy, work, "speculative", near).overlapped_s is None


def test_a_link_costs_what_it_moves() -> None:
    """Silent failure: two devices look as fast as one with twice the memory."""
    made = setup(replace(FAST, link_gb_s=1e-3), STEADY)
    work = workload(batch_size=3)
    one, two = device_maps(made, work, "diffusion", 2)
    near, far = (turns(made, work, "diffusion", place).context_s for place in (one, two))
    block = 3 * (4 * 64 * 2 + 2 * (256 * 4 + 192 * 2))  # keys of four tokens, states; per row
    assert far - near == pytest.approx(3 * block / 1e6)  # three extensions
    prompt = 3 * (8 * 64 * 2 + 2 * (256 * 4 + 192 * 2))
    times = [time_mode(made, work, "diffusion", place).prefill_s for place in (one, two)]
    assert times[1] - times[0] == pytest.approx(prompt / 1e6)


def test_break_even() -> None:
    """90 ms of AR, 6 ms a pass, 18 ms of extensions: 16 x 6 / 72."""
    assert break_even_tokens_per_nfe(0.09, 0.006, 0.018, workload()) == pytest.approx(4 / 3)
    assert break_even_tokens_per_nfe(0.042, 0.006, 0.018, workload()) == pytest.approx(4.0)
    assert break_even_tokens_per_nfe(0.041, 0.006, 0.018, workload()) is None  # more than a block
    assert break_even_tokens_per_nfe(0.018, 0.006, 0.018, workload()) is None
    assert break_even_tokens_per_cycle(0.09, 0.012, workload()) == pytest.approx(2.0)
    assert break_even_tokens_per_cycle(0.04, 0.012, workload()) is None
    assert break_even_tokens_per_cycle(0.0, 0.012, workload()) is None


def test_ar_needs_no_denoiser() -> None:
    made, work = setup(FAST, STEADY), workload()
    assert set(pass_times(made, work, placed(made, work, "ar"))) == {"ar_step", EXTEND, "verify"}


def test_the_fastest_placement_comes_first() -> None:
    """Two devices with a slow link lose against one, if one has room for both towers."""
    made = setup(replace(FAST, link_gb_s=1e-6), STEADY)
    first, second = all_times(made, workload(), "diffusion", 2)
    assert (len(first.device_map.devices), len(second.device_map.devices)) == (1, 2)
    assert first.tokens_per_s > second.tokens_per_s
    assert all_times(made, workload(), "speculative", 2) == []  # no tokens per cycle
    small = setup(replace(FAST, memory_gib=1e-9), STEADY)
    assert best_times(small, workload(), 1) == dict.fromkeys(("ar", "diffusion", "speculative"))


def test_the_faster_mode_at_each_batch_size() -> None:
    """Arithmetic in the way of blocks: beyond some batch AR wins, and every batch size agrees."""
    # 6 ms a pass are shared by all rows; the arithmetic of a token is every row's own.
    made = setup(machine(bandwidth_gb_s=1e9), STEADY)
    work = workload(prompt_tokens=1)
    points = sweep(made, work, 1, 64)
    assert list(points) == [1, 2, 4, 8, 16, 32, 64]
    first, second = faster_mode(points, per_device=False)
    assert (first.winner, second.winner) == ("diffusion", "ar")
    assert first.first == 1 and first.last * 2 == second.first and second.last == 64
    for span in (first, second):
        for batch in (span.first, span.last):
            times = best_times(made, replace(work, batch_size=batch), 1)
            ar, blocks = times["ar"], times["diffusion"]
            assert ar is not None and blocks is not None
            is_diffusion = blocks.tokens_per_s > ar.tokens_per_s
            assert span.winner == ("diffusion" if is_diffusion else "ar"), batch


def test_two_devices_are_two_replicas_of_ar() -> None:
    """Silent failure: a mode that occupies two devices is praised for beating one."""
    made, work = setup(FAST, STEADY), workload(tokens_per_nfe=4.0)
    small = replace(made, hardware=replace(FAST, memory_gib=60_000 / 2**30))
    one, two = device_maps(small, work, "diffusion", 2)
    assert (one.fits, two.fits) == (False, True)
    points = sweep(small, work, 2, 1)
    assert [s.winner for s in faster_mode(points, per_device=False)] == ["diffusion"]
    assert [s.winner for s in faster_mode(points, per_device=True)] == ["ar"]


def test_more_rows_never_slow_a_sweep_down() -> None:
    """Where the cache would push experts behind a slow link, rows wait instead."""
    deep = {"hybrid_override_pattern": "EME*"}
    base = setup(**deep)
    need = next(device_maps(base, workload(batch_size=4), "ar", 1)).devices[0].total
    made = setup(machine(memory_gib=need / 2**30, host_gib=1, host_gb_s=1e-6), **deep)
    points = sweep(made, workload(), 1, 64)
    speeds = [time.tokens_per_s for p in points.values() if (time := p["ar"]) is not None]
    assert speeds == sorted(speeds)
    last = points[max(points)]["ar"]
    assert last is not None and last.rows == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"new_tokens": 0}, "new_tokens=0 must be at least 1"),
        ({"tokens_per_nfe": 4.5}, "tokens_per_nfe=4.5 must be above 0 and at most 4"),
        ({"tokens_per_nfe": 0.0}, "tokens_per_nfe=0.0 must be above 0"),
        ({"tokens_per_cycle": 0.5}, "tokens_per_cycle=0.5 must be between 1 and 4"),
        ({"tokens_per_cycle": 5.0}, "tokens_per_cycle=5.0 must be between 1 and 4"),
    ],
)
def test_impossible_workloads(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        workload(**changes)
    assert message in str(refusal.value)
