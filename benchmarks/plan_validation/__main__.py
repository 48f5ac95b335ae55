"""How well does `twotower plan` predict what was measured, by others on the 30B and by us?

Every published speed and every figure of our own benchmarks beside its prediction, with no
parameter of its own for any row. Rewrites benchmarks/results/plan_validation.json, from which
scripts/make_figures.py makes its section of docs/figures.md, and the examples of docs/plan.md;
`--check` only says whether they are up to date. Run as `python -m benchmarks.plan_validation`.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plan_validation.bench import (
    RESULTS,
    answer_rows,
    baseline_rows,
    batch_rows,
    memory_rows,
    pass_rows,
    read_record,
)
from benchmarks.plan_validation.calibration import calibrate_cpu, calibrate_gpu
from benchmarks.plan_validation.examples import example_table
from benchmarks.plan_validation.published import (
    counted_rows,
    ratio_rows,
    read_published,
    speed_rows,
)
from benchmarks.plan_validation.rows import Row
from benchmarks.plan_validation.tables import put_between, summary_table

from twotower.cli.scripts import script_parser
from twotower.lab.plan.inputs import PROFILES, Efficiency

DOCS = Path(__file__).parents[2] / "docs" / "plan.md"
RECORD = RESULTS / "plan_validation.json"


def all_rows() -> list[Row]:
    """Every figure by group, published ones first."""
    published = read_published()
    rows = [
        *speed_rows(published),
        *ratio_rows(published),
        *counted_rows(published),
        *pass_rows("1_thread", "bench-1-thread"),
        *pass_rows("2_threads", "bench-2-threads"),
        *baseline_rows("1_thread", "bench-1-thread"),
        *baseline_rows("2_threads", "bench-2-threads"),
        *answer_rows(),
        *batch_rows(),
        *memory_rows(),
    ]
    groups = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda row: groups.index(row.group))


def solved_profiles() -> dict[str, Efficiency]:
    """What the calibrated figures say, to full precision."""
    return {
        "eager-gpu": calibrate_gpu(),
        "eager-cpu": calibrate_cpu("eager", "eager-cpu"),
        "native-cpu": calibrate_cpu("native", "native-cpu"),
        "native-int8-cpu": calibrate_cpu("native-int8", "native-int8-cpu"),
    }


def make_record(rows: Sequence[Row]) -> dict[str, object]:
    raced = read_record("race_1_thread")["recorded"]
    return {
        "recorded": {**raced, "command": "python -m benchmarks.plan_validation"},
        "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows],
        "profiles": {name: dataclasses.asdict(found) for name, found in PROFILES.items()},
        "solved": {name: dataclasses.asdict(found) for name, found in solved_profiles().items()},
    }


def make_page(text: str) -> str:
    """docs/plan.md with its examples renewed."""
    return put_between(text, "examples", example_table())


def main() -> int:
    parser = script_parser(__doc__, prog="python -m benchmarks.plan_validation")
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; say whether record and page are up to date",
    )
    args = parser.parse_args()
    rows = all_rows()
    page = make_page(DOCS.read_text(encoding="utf-8"))
    record = json.dumps(make_record(rows), indent=1) + "\n"
    if args.check:
        is_new = page == DOCS.read_text(encoding="utf-8") and record == RECORD.read_text()
        print("up to date" if is_new else "docs/plan.md or its JSON are old: run without --check")
        return 0 if is_new else 1
    DOCS.write_text(page, encoding="utf-8")
    RECORD.write_text(record)
    print(summary_table(rows))
    for name, found in solved_profiles().items():
        print(f"{name}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
