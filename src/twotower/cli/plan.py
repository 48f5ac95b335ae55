"""`twotower plan`: does it fit, how fast is each mode, what does it cost; nothing is loaded."""

import json
from dataclasses import asdict

from twotower.cli.measuring import open_folder, require_library
from twotower.cli.tables import make_console, print_table
from twotower.lab.plan import PlanOptions, make_plan
from twotower.lab.plan.hardware import Hardware
from twotower.lab.plan.options import known_hardware
from twotower.lab.plan.report import headline, tables, write_plan
from twotower.lab.report import Record, Table


def run(options: PlanOptions) -> int:
    """Print the plan; returns the exit status. Errors of the user arrive as ValueError."""
    if options.list_hardware:
        known = known_hardware(options.hardware_file)
        if options.json:
            print(json.dumps({name: asdict(machine) for name, machine in known.items()}, indent=1))
        else:
            print_table(make_console(), hardware_table(known))
        return 0
    if options.output is not None:
        require_library("matplotlib")
    record = make_plan(options)
    if options.output is not None:
        open_folder(options.output)
        write_plan(record, options.output)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        print_plan(record)
    return 0


def print_plan(record: Record) -> None:
    """Findings in sentences, then a table of modes and one of passes."""
    console = make_console()
    for line in headline(record):
        console.print(line, markup=False)
    for table in tables(record):
        print_table(console, table)
    console.print("\nPredicted, not measured; docs/plan.md says how well.")


def hardware_table(known: dict[str, Hardware]) -> Table:
    """Every machine with its figures and where they come from."""
    columns = ("name", "kind", "GiB", "GB/s", "TFLOP/s", "link GB/s", "$/h", "source")
    rows = [
        [
            name,
            machine.kind,
            f"{machine.memory_gib:g}",
            f"{machine.bandwidth_gb_s:g}",
            ", ".join(f"{rate:g} {dtype}" for dtype, rate in machine.tflops.items()),
            "-" if machine.link_gb_s is None else f"{machine.link_gb_s:g}",
            "-" if machine.price_per_hour is None else f"{machine.price_per_hour:g}",
            machine.source,
        ]
        for name, machine in known.items()
    ]
    return Table("machines", columns, rows)
