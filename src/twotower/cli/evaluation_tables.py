"""Results of an evaluation as tables in a terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from twotower.lab.evaluate.results import BASELINE


def print_results(results: Mapping[str, object], console: Console) -> None:
    """A table per category and one for all."""
    categories, modes = results["categories"], results["modes"]
    assert isinstance(categories, dict) and isinstance(modes, dict)
    for name, measured in {**categories, "all": modes}.items():
        console.print(mode_table(name, measured))
    if points := results["sweep"]:
        assert isinstance(points, list)
        console.print(sweep_table(points))
    if (likelihood := results["likelihood"]) is not None:
        assert isinstance(likelihood, dict)
        console.print(likelihood_table(likelihood))
    if BASELINE not in modes:
        console.print("No retention and no speed ratio: ar is not among the modes.")


COLUMNS = (
    *("acc %", "95 %", "kept %", "95 % ", "=ar"),
    *("t/NFE", "NFE", "t/ctx", "t/s", "x ar", "loops"),
)


def mode_table(name: str, measured: Mapping[str, Mapping[str, object]]) -> Table:
    """Accuracy with its interval, retention, passes and speed of every mode."""
    first = next(iter(measured.values()))
    title = f"{name} ({first['n']} items)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("mode")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for mode, row in measured.items():
        table.add_row(
            mode,
            _percent(row["accuracy"]),
            describe_range(row["interval"]),
            _percent(row["retention"]),
            describe_range(row["retention_interval"]),
            "-" if row["same_as_ar"] is None else str(row["same_as_ar"]),
            _number(row["tokens_per_nfe"], 2),
            str(row["nfe"]),
            _number(row["tokens_per_forward"], 2),
            _number(row["tokens_per_s"], 0),
            _number(row["speed_ratio"], 2),
            str(row["degenerate"]),
        )
    return table


def sweep_table(points: Sequence[Mapping[str, object]]) -> Table:
    """Quality and speed of diffusion at each threshold, then at each limit of passes."""
    title = f"diffusion with other settings ({points[0]['n']} items)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for column in ("threshold", "most passes", "acc %", "kept %", "t/NFE", "t/s", "x ar"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        limit = point["steps_per_block"]
        table.add_row(
            f"{point['confidence_threshold']:g}",
            "-" if limit is None else str(limit),
            _percent(point["accuracy"]),
            _percent(point["retention"]),
            _number(point["tokens_per_nfe"], 2),
            _number(point["tokens_per_s"], 0),
            _number(point["speed_ratio"], 2),
        )
    return table


def likelihood_table(likelihood: Mapping[str, dict[str, Mapping[str, object]]]) -> Table:
    """Nats per token of the reference answers: the context tower's, the denoiser's bound."""
    title = f"likelihood of the reference answers ({likelihood['noisings']} noisings a block)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("category")
    for column in ("tokens", "ar nats/token", "bound nats/token", "+-"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in {**likelihood["categories"], "all": likelihood["all"]}.items():
        numbers = ("ar_nats_per_token", "bound_nats_per_token", "bound_standard_error")
        table.add_row(name, str(row["tokens"]), *[_number(row[key], 4) for key in numbers])
    return table


def _percent(value: object) -> str:
    return f"{100 * value:.1f}" if isinstance(value, float) else "-"


def describe_range(bounds: object) -> str:
    assert isinstance(bounds, list)
    low, high = bounds
    return "-" if low is None else f"{100 * low:.0f}-{100 * high:.0f}"


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else "-"
