"""Predictions of what our own benchmarks recorded in benchmarks/results."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.plan_validation.rows import Row, both

from twotower import load_tokenizer
from twotower.checkpoint.inspect import Tower, describe, describe_config
from twotower.lab.bench.replay import random_config
from twotower.lab.evaluate.suite import held_out
from twotower.lab.plan.hardware import built_in
from twotower.lab.plan.inputs import PROFILES, Efficiency, Mode, Width, Widths, Workload, uniform
from twotower.lab.plan.memory import device_maps
from twotower.lab.plan.modes import ModeTime, time_mode
from twotower.lab.plan.passes import ModelShape, Pass, PlanSetup, time_pass

RESULTS = Path(__file__).parents[1] / "results"
DATE, ROWS_DATE = "cpu_2026-11-26.json", "cpu_2026-11-29.json"
PROFILE = {"eager": "eager-cpu", "native": "native-cpu"}
PROFILE |= {"native-int8": "native-int8-cpu", "transformers": "eager-cpu"}
INT8 = {"native-int8-cpu"}  # profiles of int8 arithmetic on int8 weights
# llama.cpp is not our code: held against what no code can beat.
LLAMA: dict[str, Width] = {"llama.cpp-f32": "float32", "llama.cpp-f16": "bfloat16"}
LLAMA |= {"llama.cpp-q8_0": "int8"}
CALLS: dict[str, tuple[Tower, int, int]] = {
    "ar_step": ("context", 1, 1),
    "denoise_pass": ("denoiser", 16, 16),
    "extend": ("context", 16, 0),
    "verify": ("context", 16, 16),
}
# The three figures of each backend that set its three parameters (one thread).
CALIBRATION = (("shipped", "ar_step"), ("160M", "ar_step"), ("160M", "denoise_pass"))
ROWS_CALIBRATION = ("ar", 16)  # and the one that sets what rows share
_ROWS_CATEGORIES = ("math", "code", "tools", "knowledge")  # of benchmarks/rows.py


def read_record(name: str, date: str = DATE) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}_{date}").read_text())
    return record


@cache
def shape_of(size: str) -> ModelShape:
    """The shipped model, or one of the benchmark's random ones."""
    if size == "shipped":
        return ModelShape.of(describe(Path(str(resources.files("twotower") / "assets"))))
    return ModelShape.of(describe_config(random_config(size, 16), size))


def make_setup(size: str, hardware: str, profile: str, width: Width = "float32") -> PlanSetup:
    """A model on the bench machine; what is not int8 arithmetic is float32 throughout."""
    is_int8 = profile in INT8
    width = "int8" if is_int8 else width
    base = uniform(width)
    widths = Widths(
        experts=width, projections=width, head=base.head, dtype="float32"
    )  # baselines keep keys and norms in float32 or near it
    return PlanSetup(
        shape=shape_of(size),
        hardware=built_in()[hardware],
        widths=widths,
        efficiency=PROFILES[profile],
        compute="int8" if is_int8 else "float32",
    )


def predict_call(setup: PlanSetup, call: str, past: int) -> float:
    """Milliseconds of one of the benchmark's passes."""
    tower, tokens, logits = CALLS[call]
    made = Pass(tower=tower, rows=1, tokens=tokens, logits=logits, past=past)
    return 1e3 * time_pass(setup, made).seconds


def pass_rows(threads: str, hardware: str) -> Iterator[Row]:
    """Every pass of every size and backend of a benchmark; native ones of the small model have one
    thread in each."""
    for size, found in read_record(f"race_{threads}")["sizes"].items():
        for engine, calls in found["ms_by_engine"].items():
            is_small = size == "shipped" and engine.startswith("native")
            machine = "bench-1-thread" if is_small else hardware
            setup = make_setup(size, machine, PROFILE[engine])
            for call, measured in calls.items():
                is_calibrated = threads == "1_thread" and (size, call) in CALIBRATION
                yield Row(
                    group=f"our passes, {threads.replace('_', ' ')}",
                    what=f"{size}, {engine}, {call.replace('_', ' ')}",
                    unit="ms",
                    predicted=predict_call(setup, call, found["num_past"]),
                    measured=both(measured["median"]),
                    calibrated=is_calibrated,
                )


def baseline_rows(threads: str, hardware: str) -> Iterator[Row]:
    """A baseline's AR token without its prompt."""
    for size, found in read_record(f"race_{threads}")["sizes"].items():
        for engine, modes in found["engines"].items():
            if engine in found["ms_by_engine"]:
                continue
            is_llama = engine in LLAMA
            profile = "limit" if is_llama else PROFILE[engine]
            setup = make_setup(size, hardware, profile, LLAMA.get(engine, "float32"))
            yield Row(
                group="llama.cpp against the limit" if is_llama else "transformers as eager code",
                what=f"{size}, {engine}, {threads.replace('_', ' ')}, a token",
                unit="ms",
                predicted=predict_call(setup, "ar_step", found["num_past"]),
                measured=both(modes["ar"]["decode_ms_per_token"]),
            )


def answer_rows() -> Iterator[Row]:
    """Whole answers of the evaluation, by category: lengths and tokens per pass as recorded."""
    for category, modes in read_record("evaluate")["categories"].items():
        for mode, found in modes.items():
            work = _recorded_work(found, _prompt_tokens(category, found["n"]))
            time = _time(make_setup("shipped", "bench-1-thread", "native-cpu"), work, mode)
            yield Row(
                group="our answers, native, 1 thread",
                what=f"{category}, {mode}",
                unit="tokens/s",
                predicted=time.tokens_per_s,
                measured=both(found["tokens_per_s"]),
            )


def batch_rows() -> Iterator[Row]:
    """What several rows at a time gain over one: ratios, which say nothing of the machine."""
    for backend in ("eager", "native"):
        measured = measured_rows(backend)
        for mode, rows in measured:
            if rows > 1:
                yield Row(
                    group=f"our rows, {backend}",
                    what=f"{mode}, {rows} rows",
                    unit="times one row",
                    predicted=predict_rows(
                        PROFILES[PROFILE[backend]], PROFILE[backend], mode, rows
                    ),
                    measured=both(measured[mode, rows] / measured[mode, 1]),
                    calibrated=(mode, rows) == ROWS_CALIBRATION,
                )


def measured_rows(backend: str) -> dict[tuple[Mode, int], float]:
    """Tokens a second by mode and number of rows."""
    results = read_record(f"rows_{backend}", ROWS_DATE)["results"]
    return {(one["mode"], one["rows"]): one["tokens_per_s"]["median"] for one in results}


def predict_rows(efficiency: Efficiency, profile: str, mode: Mode, rows: int) -> float:
    """What `rows` rows of the shipped model gain over one. Tokens per pass were not recorded there:
    those of the evaluation's four categories are taken.
    """
    categories = read_record("evaluate")["categories"]
    prompt = round(fmean(_prompt_tokens(name, 200) for name in _ROWS_CATEGORIES))
    kept = [categories[name][mode] for name in _ROWS_CATEGORIES]
    names = ("tokens", "nfe", "context_forwards", "n")
    total = {name: sum(k[name] for k in kept) for name in names}
    setup = replace(make_setup("shipped", "bench-1-thread", profile), efficiency=efficiency)
    many, one = (_time(setup, _recorded_work(total, prompt, n), mode) for n in (rows, 1))
    return many.tokens_per_s / one.tokens_per_s


def memory_rows() -> Iterator[Row]:
    """Growth of resident memory while decoding: cache and activations."""
    record = read_record("decode_memory")
    setup = make_setup("shipped", "bench-1-thread", "eager-cpu")
    for case in record["cases"]:
        work = Workload(
            batch_size=1,
            prompt_tokens=case["prompt_tokens"],
            new_tokens=record["settings"]["new_tokens"],
            block_size=16,
            tokens_per_nfe=6.0,
            tokens_per_cycle=9.0,
        )
        (device,) = next(device_maps(setup, work, case["mode"], 1)).devices
        yield Row(
            group="our memory beside weights",
            what=f"{case['mode']}, prompt of {case['prompt_tokens']}",
            unit="MB",
            predicted=(device.cache + device.activations) / 1e6,
            measured=both(case["growth_bytes"] / 1e6),
        )


@cache
def _prompt_tokens(category: str, count: int) -> int:
    """Mean length of a category's held-out prompts."""
    tokenizer = load_tokenizer(Path(str(resources.files("twotower") / "assets")))
    prompts = [document.prompt for document in held_out(category, count, 0)]
    return round(fmean(len(tokenizer.encode(prompt)) for prompt in prompts))


def _recorded_work(found: Mapping[str, Any], prompt: int, rows: int = 1) -> Workload:
    """The workload of recorded sums: `n` answers, their tokens, passes and context forwards."""
    cycles = found["context_forwards"] - found["n"]
    return Workload(
        batch_size=rows,
        prompt_tokens=prompt,
        new_tokens=max(2, round(found["tokens"] / found["n"])),
        block_size=16,
        tokens_per_nfe=min(16.0, found["tokens"] / found["nfe"]) if found["nfe"] else 16.0,
        tokens_per_cycle=min(16.0, max(1.0, (found["tokens"] - found["n"]) / cycles)),
    )


def _time(setup: PlanSetup, work: Workload, mode: Mode) -> ModeTime:
    (place,) = device_maps(setup, work, mode, 1)
    return time_mode(setup, work, mode, place)
