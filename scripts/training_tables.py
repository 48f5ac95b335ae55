"""Tables of figures.md on training, predictions and ablations."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations import report
from benchmarks.plan_validation.published import read_published
from benchmarks.plan_validation.rows import Row
from benchmarks.plan_validation.tables import summary_table, whole_table
from figure_tables import markdown, number

Record = Mapping[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def parallel_training(record: Record) -> str:
    """Largest difference of any step's loss from one process's."""
    runs = ("processes_2", "processes_4", "one_process_in_two_passes")
    rows = [
        [case["case"], *(f"{case[run]['loss']:.1e}" if run in case else "-" for run in runs)]
        for case in record["equality"]
    ]
    resumed = [
        [f"resumed, {one['legs']}", f"{one['loss']:.1e}", "-", "-"] for one in record["resume"]
    ]
    lost = record["lost_process"]
    ended = ", ".join(f"{one['process']} {one['ended_after_s']} s" for one in lost)
    head = ["run", "2 processes", "4 processes", "1 process, twice the passes"]
    return (
        f"{markdown(head, [*rows, *resumed])}\n\n"
        f"The other process ended after one was lost: {ended} later."
    )


def training_runs(record: Record) -> str:
    """Every run of the shipped model, from its metrics."""
    rows = []
    for run in record["runs"]:
        logs = [read_metrics(file) for file in run["files"]]
        losses = [number(last(log, "validation_loss"), 4) for log in logs]
        steps = [f"{log[-1]['step']:,}" for log in logs]
        rates = [f"{max(line.get('learning_rate', 0) for line in log):.2g}" for log in logs]
        cells = (steps, rates, losses)
        rows.append([run["run"], *(", ".join(each) for each in cells), run["time"]])
    head = ["run", "steps of 16 x 256 tokens", "peak rate", "last held-out loss, nats a token"]
    return markdown([*head, "time"], rows)


def read_metrics(name: str) -> list[dict[str, float]]:
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def last(lines: Sequence[Mapping[str, float]], name: str) -> float | None:
    found = [line[name] for line in lines if name in line]
    return found[-1] if found else None


# Predictions, ablations ---------------------------------------------------------------------


def plan_validation(record: Record) -> str:
    """Every prediction of `twotower plan` beside what was measured."""
    rows = [Row(**{k: v for k, v in row.items() if k != "ratio"}) for row in record["rows"]]
    return f"{summary_table(rows)}\n\n{whole_table(rows, read_published()['not_predicted'])}"


def ablations(names: str) -> Callable[[Record], str]:
    """A maker of those tables whose name matches; it reads all records of ablations."""

    def make(_: Record) -> str:
        makers = report.tables(*report.read_records(RESULTS / "ablations"))
        chosen = {name: maker for name, maker in makers.items() if re.fullmatch(names, name)}
        return "\n\n".join(f"#### Ablation: {name}\n\n{maker()}" for name, maker in chosen.items())

    return make
