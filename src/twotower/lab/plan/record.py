"""A plan as one record of plain values: what `--json` prints and the report draws."""

import dataclasses
from typing import Any

from twotower.lab.plan.inputs import MODES, Mode, Workload
from twotower.lab.plan.memory import DeviceMap, cache_bytes, tower_bytes
from twotower.lab.plan.modes import (
    Best,
    ModeTime,
    all_times,
    best_times,
    break_even_tokens_per_cycle,
    break_even_tokens_per_nfe,
    faster_mode,
    nearest_misfit,
    pass_times,
    sweep,
    turns,
)
from twotower.lab.plan.options import PlanOptions, describe_model, make_setup, make_workload
from twotower.lab.plan.passes import AR_STEP, DENOISE, EXTEND, VERIFY, ModelShape, PlanSetup

TARGETS = (1.0, 2.42)  # speed-ups over AR: equal, and what the announcement reports
_GIB = 2**30


def make_plan(options: PlanOptions) -> dict[str, Any]:
    """The whole record; ValueError (one line) for whatever the options name wrongly."""
    return plan_shape(ModelShape.of(describe_model(options.model, options.denoiser)), options)


def plan_shape(shape: ModelShape, options: PlanOptions) -> dict[str, Any]:
    """The record of a model that is described already."""
    setup = make_setup(options, shape)
    workload = make_workload(options, shape.config.block_size)
    # Passes and break-evens need to know where a mode runs, not how many tokens a pass commits.
    placed = dataclasses.replace(workload, tokens_per_nfe=workload.tokens_per_nfe or 1.0)
    best = best_times(setup, placed, options.devices)
    price = options.price_per_hour
    price = setup.hardware.price_per_hour if price is None else price
    points = sweep(setup, workload, options.devices, options.max_batch_size)
    compared = {} if workload.tokens_per_nfe is None else points
    return {
        "model": {
            "name": options.model,
            "denoiser": options.denoiser,
            "parameters": {tower: sum(n.values()) for tower, n in shape.parameters.items()},
        },
        "hardware": dataclasses.asdict(setup.hardware),
        "devices": options.devices,
        "widths": dataclasses.asdict(setup.widths),
        "compute": setup.compute,
        "efficiency": dataclasses.asdict(setup.efficiency),
        "workload": {**dataclasses.asdict(workload), "source": _source(options)},
        "price_per_hour": price,
        "memory": _memory(setup, workload),
        "modes": {mode: _mode(setup, workload, mode, options.devices, price) for mode in MODES},
        "passes": _passes(setup, placed, best),
        "break_even": _break_even(setup, placed, best),
        "sweep": [
            {"batch_size": batch, "modes": {mode: _rate(time) for mode, time in times.items()}}
            for batch, times in points.items()
        ],
        "spans": {
            name: [dataclasses.asdict(span) for span in faster_mode(compared, name != "all")]
            for name in ("all", "per_device")
        },
    }


def _source(options: PlanOptions) -> str:
    """Where tokens per pass come from."""
    if options.tokens_per_nfe is not None:
        return "given"
    if options.results is not None:
        return "results"
    return "published" if options.denoiser is None else "unknown"


def _memory(setup: PlanSetup, workload: Workload) -> dict[str, Any]:
    """Bytes of each tower, of a row's cache when its answer ends, and what a device offers."""
    length = workload.prompt_tokens + workload.new_tokens
    towers = {t: sum(tower_bytes(setup.shape, t, setup.widths)) for t in setup.shape.parameters}
    return {
        "tower_bytes": towers,
        "cache_bytes_per_row": cache_bytes(setup.shape, 1, length, setup.widths),
        "usable_bytes_per_device": setup.hardware.usable_bytes,
        "host_bytes": setup.hardware.host_bytes,
    }


def _mode(
    setup: PlanSetup, workload: Workload, mode: Mode, num_devices: int, price: float | None
) -> dict[str, Any]:
    """One mode on its fastest device_map, the other ones that fit, or what is missing."""
    times = all_times(setup, workload, mode, num_devices)
    if times:
        first, *others = (_time(time, num_devices, price) for time in times)
        return {"fits": True, **first, "others": others}
    misfit = nearest_misfit(setup, workload, mode, num_devices)
    record: dict[str, Any] = {"fits": misfit.fits, "device_map": _device_map(misfit)}
    if misfit.fits:
        unit = "pass" if mode == "diffusion" else "cycle"
        flag = "--tokens-per-nfe" if mode == "diffusion" else "--tokens-per-cycle"
        record["missing"] = f"tokens per {unit} are not known: give {flag} or --results"
    else:
        record["missing"] = _describe_misfit(misfit)
    return record


def _time(time: ModeTime, num_devices: int, price: float | None) -> dict[str, Any]:
    used = len(time.device_map.devices)
    cost = None if price is None else used * price / 3600 / time.tokens_per_s * 1e6
    return {
        "device_map": _device_map(time.device_map),
        "overlapped": time.overlapped,
        "prefill_ms": 1e3 * time.prefill_s,
        "first_tokens_ms": 1e3 * time.first_s,
        "decode_ms": 1e3 * time.decode_s,
        "decode_ms_in_sequence": 1e3 * time.sequence_s,
        "decode_ms_overlapped": None if time.overlapped_s is None else 1e3 * time.overlapped_s,
        "tokens_per_s": time.tokens_per_s,
        "decode_tokens_per_s": time.decode_tokens_per_s if time.decode_s else None,
        "tokens_per_s_of_a_row": time.tokens_per_s / time.rows,
        "devices_used": used,
        "tokens_per_s_all_devices": time.tokens_per_s * (num_devices // used),
        "dollars_per_million_tokens": cost,
    }


def _device_map(device_map: DeviceMap) -> dict[str, Any]:
    return {
        "name": device_map.name,
        "devices": [
            dataclasses.asdict(device)
            | {"towers": list(device.towers), "total": device.total, "fits": device.fits}
            for device in device_map.devices
        ],
        "host_share": list(device_map.host_share),
        "host_bytes": device_map.host_bytes,
        "host_room": device_map.host_room,
    }


def _describe_misfit(device_map: DeviceMap) -> str:
    """What a device or the host would need, in GiB."""
    for device in device_map.devices:
        if not device.fits:
            verb = "needs" if len(device.towers) == 1 else "need"
            return (
                f"{' and '.join(device.towers)} {verb} {device.total / _GIB:.1f} GiB of a device "
                f"that offers {device.usable / _GIB:.1f}"
            )
    return (
        f"experts need {device_map.host_bytes / _GIB:.1f} GiB of host memory "
        f"that offers {device_map.host_room / _GIB:.1f}"
    )


def _passes(setup: PlanSetup, workload: Workload, best: Best) -> dict[str, dict[str, Any]]:
    """Each pass where the modes that need it run fastest."""
    blocks = best["diffusion"]
    owners = {AR_STEP: best["ar"], DENOISE: blocks, EXTEND: blocks}
    found = {}
    for call, time in {**owners, VERIFY: best["speculative"] or blocks}.items():
        if time is not None:
            took = pass_times(setup, workload, time.device_map)[call]
            parts = ("overhead", "stream", "compute", "host")
            found[call] = {
                "ms": 1e3 * took.seconds,
                **{f"{part}_ms": 1e3 * getattr(took, f"{part}_s") for part in parts},
                "experts_per_layer": took.num_experts,
                "ruled_by": took.ruled_by,
            }
    return found


def _break_even(setup: PlanSetup, workload: Workload, best: Best) -> dict[str, Any] | None:
    """Tokens per pass and per cycle that reach each speed-up over AR, decoding alone and one
    group of rows; None where AR or both towers do not fit, null where a whole block does not do.
    """
    ar, blocks = best["ar"], best["diffusion"]
    if ar is None or blocks is None or workload.new_tokens < 2:
        return None
    calls = pass_times(setup, workload, blocks.device_map)
    reads_s = turns(setup, workload, "diffusion", blocks.device_map).context_s
    draft_s = workload.draft_passes * calls[DENOISE].seconds
    probe = dataclasses.replace(workload, tokens_per_cycle=float(workload.block_size))
    cycle = turns(setup, probe, "speculative", blocks.device_map)
    cycle_s = draft_s + cycle.context_s / cycle.cycles
    per_nfe, per_cycle = {}, {}
    for target in TARGETS:
        ar_s = ar.sequence_s / target
        denoise_s = calls[DENOISE].seconds
        per_nfe[f"{target:g}"] = break_even_tokens_per_nfe(ar_s, denoise_s, reads_s, workload)
        per_cycle[f"{target:g}"] = break_even_tokens_per_cycle(ar_s, cycle_s, workload)
    return {
        "read_ms": 1e3 * reads_s / max(1, workload.extensions),
        "denoise_per_ar_step": denoise_s / (ar.sequence_s / (workload.new_tokens - 1)),
        "tokens_per_nfe": per_nfe,
        "tokens_per_cycle": per_cycle,
    }


def _rate(time: ModeTime | None) -> dict[str, float] | None:
    if time is None:
        return None
    used = len(time.device_map.devices)
    return {"tokens_per_s": time.tokens_per_s, "rows": time.rows, "devices_used": used}
