"""What do the ablations' records say? Draws the pictures of docs/ablations.md.

The tables, by `tables`, stand in docs/figures.md: scripts/make_figures.py. The last line printed
is one JSON object.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from benchmarks.ablations import pictures
from benchmarks.ablations.scoring import RESULTS, Record, compare, verdict_vector
from benchmarks.ablations.variants import BASE, TABLES, VARIANTS

from twotower.cli.scripts import script_parser

REFERENCES = ("ar", "diffusion")  # of every sampling record: the limit and the control
MISSING = "Not measured yet."
PICTURES = Path("docs/ablations")


def main() -> None:
    args = parser().parse_args()
    trained, sampled = read_records(args.results)
    drawn = pictures.draw(trained, sampled, args.pictures)
    print(json.dumps({"pictures": [path.name for path in drawn]}))


def parser() -> argparse.ArgumentParser:
    found = script_parser(__doc__, "python -m benchmarks.ablations.report")
    found.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    found.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the pictures")
    return found


def read_records(folder: Path) -> tuple[dict[str, Record], dict[str, Record]]:
    """Records of training by variant, and of sampling by model, whose tables are put together."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit(f"results: no record in {folder}; run train or sample first")
    trained: dict[str, Record] = {}
    sampled: dict[str, Record] = {}
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        name = record["name"]
        if file.stem.startswith("train-"):
            trained[name] = record
        else:
            sampled[name] = join(sampled[name], record) if name in sampled else record
    return trained, sampled


def join(first: Record, second: Record) -> Record:
    """One record of two runs on one model; ValueError if their items or their control differ."""
    for name in REFERENCES:
        if first["verdicts"][name] != second["verdicts"][name]:
            raise ValueError(f"{first['name']}: runs differ in {name}; use another --name for one")
    parts = ("tables", "modes", "verdicts")
    return {**first, **{part: {**first[part], **second[part]} for part in parts}}


def tables(
    trained: Mapping[str, Record], sampled: Mapping[str, Record]
) -> dict[str, Callable[[], str]]:
    """Makers of tables by name."""
    made: dict[str, Callable[[], str]] = {
        name: lambda names=names: trained_table(trained, names) for name, names in TABLES.items()
    }
    made["tied-own"] = lambda: own_table(trained)
    made["categories"] = lambda: category_table(trained)
    made = {name: maker if BASE in trained else lambda: MISSING for name, maker in made.items()}
    for name, record in sampled.items():
        for table, settings in record["tables"].items():
            made[f"sample-{name}-{table}"] = lambda r=record, s=settings: sampled_table(r, s)
    return made


def trained_table(trained: Mapping[str, Record], names: tuple[str, ...]) -> str:
    """A row per variant, at both thresholds."""
    base = trained[BASE]
    rows = []
    for name in names:
        if name not in trained:
            continue
        record = trained[name]
        cells = [f"`{name}`"]
        for mode in ("diffusion 0.8", "diffusion 0.95"):
            found = record["modes"][mode]
            gain = "-" if name == BASE else difference(record, mode, base, mode)
            cells += [accuracy(found), gain, number(found["tokens_per_nfe"])]
        cells.append(percent_range(found["retention"], found["retention_interval"]))
        nats = np.array(record["bounds"])
        gain = "-" if name == BASE else bound_difference(record, base)
        rows.append([*cells, f"{nats.mean():.2f}", gain])
    head = ["variant"]
    for threshold in ("0.8", "0.95"):
        head += [f"accuracy at {threshold}, %", "minus `base`, points", "tok/NFE"]
    head.append("kept of AR at 0.95, %")
    return markdown([*head, "bound, nats/answer", "minus `base`"], rows)


def own_table(trained: Mapping[str, Record]) -> str:
    """Tied towers against the backbone's AR and against their own context head's."""
    rows = []
    for name in TABLES["towers"]:
        record = trained.get(name)
        if record is None:
            continue
        own = "own ar" if "own ar" in record["modes"] else "ar"
        kept = record["modes"]["diffusion 0.95"]["accuracy"]
        head = record["modes"][own]["accuracy"]
        rows.append(
            [
                f"`{name}`",
                accuracy(record["modes"]["ar"]),
                accuracy(record["modes"][own]),
                "-" if own == "ar" else difference(record, own, record, "ar"),
                difference(record, "diffusion 0.95", record, own),
                "-" if head == 0 else f"{100 * kept / head:.1f}",
            ]
        )
    head = ["variant", "backbone's AR, %", "own context head's AR, %", "own minus backbone's"]
    return markdown([*head, "diffusion 0.95 minus own", "kept of own, %"], rows)


def category_table(trained: Mapping[str, Record]) -> str:
    """Accuracy by category at threshold 0.95; first the backbone's."""
    categories = list(trained[BASE]["categories"])
    first = trained[BASE]["categories"]
    rows = [["AR of the backbone", *[plain(first[c]["ar"]["accuracy"]) for c in categories]]]
    for name in VARIANTS:
        if name in trained:
            measured = trained[name]["categories"]
            found = [plain(measured[c]["diffusion 0.95"]["accuracy"]) for c in categories]
            rows.append([f"`{name}`", *found])
    return markdown(["accuracy at 0.95, %", *categories], rows)


def sampled_table(record: Record, settings: list[str]) -> str:
    """The AR limit, the control, and a row per setting with its difference to the control."""
    rows = []
    for name in (*REFERENCES, *settings):
        found = record["modes"][name]
        rows.append(
            [
                {"ar": "AR", "diffusion": "control"}.get(name, name),
                accuracy(found),
                percent_range(found["retention"], found["retention_interval"]),
                "-" if name in REFERENCES else difference(record, name, record, "diffusion"),
                number(found["tokens_per_nfe"]),
            ]
        )
    head = ["setting", "accuracy, %", "kept of AR, %", "minus control, points", "tok/NFE"]
    return markdown(head, rows)


def difference(ours: Record, mode: str, theirs: Record, other: str) -> str:
    """Points of accuracy between two settings on the same items, with the paired interval."""
    categories = list(ours["categories"])
    gain, (low, high) = compare(
        verdict_vector(ours["verdicts"][mode], categories),
        verdict_vector(theirs["verdicts"][other], categories),
    )
    return f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def bound_difference(ours: Record, theirs: Record) -> str:
    """Nats per answer between two denoisers on the same answers, with the paired interval."""
    gain, (low, high) = compare(np.array(ours["bounds"]), np.array(theirs["bounds"]))
    return f"{gain:+.2f} ({low:+.2f} to {high:+.2f})"


def accuracy(found: Record) -> str:
    return percent_range(found["accuracy"], found["interval"])


def percent_range(value: float | None, bounds: list[float | None]) -> str:
    if value is None or bounds[0] is None or bounds[1] is None:
        return "-"
    return f"{100 * value:.1f} ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"


def plain(value: float) -> str:
    return f"{100 * value:.0f}"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
