"""`twotower plan`: does it fit, how fast is each mode, what does it cost; nothing is loaded."""

import json
from dataclasses import asdict
from importlib.util import find_spec

from rich import box
from rich.console import Console
from rich.table import Table

from twotower.cli.evaluate import open_folder
from twotower.lab.plan import PlanOptions, make_plan
from twotower.lab.plan.hardware import Hardware
from twotower.lab.plan.options import known_hardware
from twotower.lab.plan.report import write_plan
from twotower.lab.plan.sentences import (
    MODE_COLUMNS,
    PASS_COLUMNS,
    Record,
    headline,
    memory_lines,
    mode_row,
    pass_row,
)

_WIDTH = 120  # of tables that go into a file


def run(options: PlanOptions) -> int:
    """Print the plan; returns the exit status. Errors of the user arrive as ValueError."""
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    if options.list_hardware:
        known = known_hardware(options.hardware_file)
        if options.json:
            print(json.dumps({name: asdict(machine) for name, machine in known.items()}, indent=1))
        else:
            console.print(hardware_table(known))
        return 0
    if options.out is not None and find_spec("matplotlib") is None:
        raise ImportError('matplotlib is not installed: pip install "twotower[eval]"')
    record = make_plan(options)
    if options.out is not None:
        open_folder(options.out)
        write_plan(record, options.out)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        print_plan(record, console)
    return 0


def print_plan(record: Record, console: Console) -> None:
    """Findings in sentences, then a table of modes and one of passes."""
    for line in [*memory_lines(record), *headline(record)]:
        console.print(line, highlight=False, markup=False)
    rows = {mode: mode_row(found) for mode, found in record["modes"].items()}
    console.print(_table("modes", ("mode", *MODE_COLUMNS), rows))
    rows = {call: pass_row(found) for call, found in record["passes"].items()}
    if rows:
        console.print(_table("passes, ms", ("pass", *PASS_COLUMNS), rows))
    console.print("Predicted, not measured; docs/plan.md says how well.", highlight=False)


def hardware_table(known: dict[str, Hardware]) -> Table:
    """Every machine with its figures and where they come from."""
    columns = ("name", "kind", "GiB", "GB/s", "TFLOP/s", "link GB/s", "$/h", "source")
    rows = {
        name: [
            machine.kind,
            f"{machine.memory_gib:g}",
            f"{machine.bandwidth_gb_s:g}",
            ", ".join(f"{rate:g} {dtype}" for dtype, rate in machine.tflops.items()),
            "-" if machine.link_gb_s is None else f"{machine.link_gb_s:g}",
            "-" if machine.price_per_hour is None else f"{machine.price_per_hour:g}",
            machine.source,
        ]
        for name, machine in known.items()
    }
    return _table("machines", columns, rows)


def _table(title: str, columns: tuple[str, ...], rows: dict[str, list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify="left" if column in ("where", "source") else "right")
    table.columns[0].justify = "left"
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
