"""Solves for the parameters of the profiles that say they are calibrated, from exactly the figures
that are marked so.
"""

from dataclasses import replace
from typing import Any

from benchmarks.plan_validation.bench import (
    CALLS,
    ROWS_CALIBRATION,
    make_setup,
    measured_rows,
    predict_rows,
    read_record,
)
from benchmarks.plan_validation.published import read_published, released

from twotower.lab.plan.hardware import built_in
from twotower.lab.plan.inputs import PROFILES, Efficiency, Widths
from twotower.lab.plan.passes import ModelShape, Pass, PassTime, PlanSetup, time_pass

_TURNS = 60  # of the fixed point; it converges in a dozen


def calibrate_gpu() -> Efficiency:
    """Bandwidth and layer time from two AR figures: two equations with two unknowns."""
    published = read_published()
    past = published["assumed"]["past_tokens"]
    shape = released()
    limits, measured = [], []
    for run in published["speed"]:
        if run.get("calibrated"):
            # Steps follow the first token, which comes with the prompt.
            steps = (run["new_tokens"] - 1) / run["new_tokens"]
            measured.append(1 / run["tokens_per_s"] / steps)
            call = Pass(
                tower="context", rows=1, tokens=1, logits=1, past=past + run["new_tokens"] / 2
            )
            limits.append(time_pass(_limit(shape, run), call).seconds)
    bandwidth = (limits[0] - limits[1]) / (measured[0] - measured[1])
    layer_s = (measured[0] - limits[0] / bandwidth) / shape.config.context.num_layers
    return replace(PROFILES["eager-gpu"], bandwidth=bandwidth, layer_s=layer_s)


def _limit(shape: ModelShape, run: dict[str, Any]) -> PlanSetup:
    return PlanSetup(
        shape=shape,
        hardware=built_in()[run["hardware"]],
        widths=Widths(
            experts=run.get("expert_weights", "bfloat16"),
            projections="bfloat16",
            head="bfloat16",
            dtype="bfloat16",
        ),
        efficiency=PROFILES["limit"],
        compute="bfloat16",
    )


def calibrate_cpu(engine: str, profile: str) -> Efficiency:
    """The parameters of a backend: three from three passes, each by the one that rules it, and what
    rows share from what 16 gain over one.
    """
    sizes = read_record("race_1_thread")["sizes"]
    found = PROFILES[profile]

    def measured(size: str, call: str) -> float:
        return float(sizes[size]["ms_by_engine"][engine][call]["median"]) / 1e3

    def predicted(size: str, call: str) -> PassTime:
        setup = replace(make_setup(size, "bench-1-thread", profile), efficiency=found)
        tower, tokens, logits = CALLS[call]
        past = sizes[size]["num_past"]
        return time_pass(setup, Pass(tower=tower, rows=1, tokens=tokens, logits=logits, past=past))

    for _ in range(_TURNS):
        step = predicted("shipped", "ar_step")
        layers = step.overhead_s / found.layer_s
        left = measured("shipped", "ar_step") - step.stream_s - step.compute_s
        found = replace(found, layer_s=left / layers)
        step = predicted("160M", "ar_step")
        left = measured("160M", "ar_step") - step.overhead_s - step.compute_s
        found = replace(found, bandwidth=min(1.0, found.bandwidth * step.stream_s / left))
        step = predicted("160M", "denoise_pass")
        left = measured("160M", "denoise_pass") - step.overhead_s - step.stream_s
        found = replace(found, arithmetic=min(1.0, found.arithmetic * step.compute_s / left))
    return replace(found, row_share=_row_share(found, profile, engine.removesuffix("-int8")))


def _row_share(found: Efficiency, profile: str, backend: str) -> float:
    """By bisection: the more of a layer every row takes again, the less a batch gains."""
    measured, (mode, rows) = measured_rows(backend), ROWS_CALIBRATION
    gain = measured[mode, rows] / measured[mode, 1]
    low, high = 0.0, 1.0
    for _ in range(_TURNS):
        middle = (low + high) / 2
        gains_more = predict_rows(replace(found, row_share=middle), profile, mode, rows) > gain
        low, high = (middle, high) if gains_more else (low, middle)
    return (low + high) / 2
