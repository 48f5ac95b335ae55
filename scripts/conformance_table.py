"""Compare recorded cases of the official implementation with ours and print one table.

Usage: python scripts/conformance_table.py [DIR ...]   (no DIR: tests/golden)
DIR is a case folder (config.json, weights, golden.safetensors, golden.json) or holds such ones.
float32: largest absolute difference per group of tensors. bfloat16: the RMS of our error against
the float64 evaluation over that of the recorded one, largest per group; runs only where `robust`.
Exit status 1 when a tensor is beyond its limit, or a run's tokens or passes differ.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import recorded  # noqa: E402
from recorded import GROUPS, Case, Run  # noqa: E402
from twotower import generate  # noqa: E402

HEADER = ("case", "dtype", "tensors", *GROUPS, "within", "runs", "tokens equal", "NFE equal")


def find_cases(folders: list[Path]) -> list[Case]:
    """The case folders among and directly inside the given ones."""
    found = []
    for folder in folders:
        inside = sorted(file.parent for file in folder.glob("*/golden.safetensors"))
        is_case = (folder / "golden.safetensors").is_file() and (folder / "config.json").is_file()
        found += [folder] if is_case else [f for f in inside if (f / "config.json").is_file()]
    if not found:
        raise ValueError(f"{', '.join(map(str, folders))}: no case folder; give the path of one")
    return [Case(folder) for folder in found]


def compare_tensors(case: Case) -> tuple[dict[str, float], int, bool]:
    """The largest difference per group, the number of tensors, whether all are within limits."""
    worst: dict[str, float] = {}
    seen = set()
    for found in recorded.replay(case.model, case):
        difference = case.difference(found)
        worst[found.group] = max(worst.get(found.group, 0.0), difference)
        seen.add(found.key)
    within = all(value <= case.limit(group) for group, value in worst.items())
    return worst, len(seen), within and seen == case.keys


def compare_runs(case: Case) -> tuple[int, int, int]:
    """Compared runs, those with equal tokens, those with equal numbers of passes."""
    runs = [*recorded.recorded_runs(case), *recorded.eos_runs(case), *recorded.batch_runs(case)]
    runs = [run for run in runs if run.is_robust]
    results = [_compare(case, run) for run in runs]
    return len(runs), sum(tokens for tokens, _ in results), sum(nfe for _, nfe in results)


def _compare(case: Case, run: Run) -> tuple[bool, bool]:
    ours = generate(case.model, [run.prompt], run.options)[0]
    return ours.tokens == run.tokens, run.nfe is None or ours.nfe == run.nfe


def row(case: Case) -> tuple[list[str], bool]:
    """One line of the table, and whether all is as recorded."""
    worst, num_tensors, within = compare_tensors(case)
    num_runs, tokens, nfe = compare_runs(case)
    shown = [f"{worst[group]:.2g}" if group in worst else "-" for group in GROUPS]
    cells = [case.folder.name, case.record["dtype"], f"{num_tensors}/{len(case.keys)}", *shown]
    cells += ["yes" if within else "NO", str(num_runs), str(tokens), str(nfe)]
    return cells, within and tokens == nfe == num_runs


def lines(folders: list[Path]) -> Iterator[tuple[str, bool]]:
    """The table in Markdown, line by line as the cases are done, each with its verdict."""
    yield f"| {' | '.join(HEADER)} |", True
    yield "|" + " --- |" * len(HEADER), True
    for case in find_cases(folders):
        cells, is_equal = row(case)
        yield f"| {' | '.join(cells)} |", is_equal


def main(arguments: list[str]) -> int:
    folders = [Path(argument) for argument in arguments] or [recorded.GOLDEN]
    is_equal = True
    try:
        for line, verdict in lines(folders):
            print(line, flush=True)
            is_equal = is_equal and verdict
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
