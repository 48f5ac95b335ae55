"""Predictions of what others measured on the released checkpoint (published.toml)."""

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.plan_validation.rows import Row, both

from twotower.checkpoint.inspect import describe
from twotower.lab.plan import PlanOptions
from twotower.lab.plan.inputs import Workload
from twotower.lab.plan.modes import break_even_tokens_per_nfe
from twotower.lab.plan.passes import ModelShape
from twotower.lab.plan.record import plan_shape

FILE = Path(__file__).with_name("published.toml")
GROUP, COUNTED = "published, 30B", "published, counted"


@cache
def released() -> ModelShape:
    """The released model."""
    return ModelShape.of(describe("nano-30b"))


def read_published() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def speed_rows(published: Mapping[str, Any]) -> Iterator[Row]:
    """Decoding speeds; the machine's own default efficiency, whoever wrote the code."""
    for run in published["speed"]:
        record = plan_shape(released(), _options(run, published["assumed"]["past_tokens"]))
        yield Row(
            group=GROUP,
            what=run["what"],
            unit="tokens/s",
            predicted=record["modes"][run["mode"]]["decode_tokens_per_s"],
            measured=both(run["tokens_per_s"]),
            calibrated=run.get("calibrated", False),
            note=run.get("note", ""),
        )


def ratio_rows(published: Mapping[str, Any]) -> Iterator[Row]:
    """Speed-ups over AR with the one published number of tokens per pass, and the number that
    each would need: those of other block sizes cannot be the same.
    """
    assumed = published["assumed"]
    for run in published["ratio"]:
        given = min(assumed["tokens_per_nfe"], run["block_size"])
        record = plan_shape(released(), _ratio_options(run, given, assumed["past_tokens"]))
        modes = record["modes"]
        speeds = [modes[mode]["decode_tokens_per_s"] for mode in ("diffusion", "ar")]
        needed = _needed(record, run["times_ar"])
        yield Row(
            group=GROUP,
            what=run["what"],
            unit="x",
            predicted=speeds[0] / speeds[1],
            measured=both(run["times_ar"]),
            note=f"tokens/NFE assumed: {given:g}; exact at {needed}",
        )


def counted_rows(published: Mapping[str, Any]) -> Iterator[Row]:
    """Experts, parameters, the cost of a pass in AR steps and the break-even that follows."""
    spark = {"hardware": "dgx-spark", "devices": 2, "expert_weights": "int4", "mode": "diffusion"}
    record = plan_shape(released(), _options(spark | {"new_tokens": 256, "nfe": 66}, 128))
    passes, even = record["passes"], record["break_even"]
    towers = describe("nano-30b").towers
    sizes = [tower.total for tower in towers.values()]
    found = {
        "experts_in_a_block_of_16": passes["denoise_pass"]["experts_per_layer"],
        "experts_in_a_step": passes["ar_step"]["experts_per_layer"],
        "pass_per_ar_step": even["denoise_per_ar_step"],
        "break_even_tokens_per_nfe": even["tokens_per_nfe"]["1"],
        "parameters_of_a_tower": sizes[0],
        "active_parameters": towers["context"].active,
        "parameters": sum(sizes),
        "gib_in_bfloat16": sum(_wide_plan()["memory"]["tower_bytes"].values()) / 2**30,
    }
    for name, measured in published["counted"].items():
        words = name.replace("_", " ")
        yield Row(
            group=COUNTED, what=words, unit="", predicted=found[name], measured=both(measured)
        )


def _wide_plan() -> dict[str, Any]:
    return plan_shape(released(), PlanOptions(hardware="h100-sxm", devices=2, max_batch_size=1))


def _options(run: Mapping[str, Any], past: int) -> PlanOptions:
    nfe = run.get("nfe")
    names = [name for name in run if name.endswith("_weights")]
    parts = {name: run[name] for name in names}
    return PlanOptions(
        hardware=run["hardware"],
        devices=run.get("devices", 1),
        prompt_tokens=past,
        new_tokens=run["new_tokens"],
        tokens_per_nfe=None if nfe is None else run["new_tokens"] / nfe,
        max_batch_size=1,
        **parts,
    )


def _ratio_options(run: Mapping[str, Any], tokens_per_nfe: float, past: int) -> PlanOptions:
    return PlanOptions(
        hardware=run["hardware"],
        devices=2,
        prompt_tokens=past,
        new_tokens=256,
        block_size=run["block_size"],
        tokens_per_nfe=tokens_per_nfe,
        max_batch_size=1,
    )


def _needed(record: Mapping[str, Any], times_ar: float) -> str:
    """Tokens per pass that give exactly the published ratio."""
    passes, work = record["passes"], Workload(**_without_source(record["workload"]))
    needed = break_even_tokens_per_nfe(
        ar_s=record["modes"]["ar"]["decode_ms"] / 1e3 / times_ar,
        denoise_s=passes["denoise_pass"]["ms"] / 1e3,
        reads_s=record["break_even"]["read_ms"] / 1e3 * work.extensions,
        workload=work,
    )
    return "none" if needed is None else f"{needed:.2f}"


def _without_source(work: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in work.items() if name != "source"}
