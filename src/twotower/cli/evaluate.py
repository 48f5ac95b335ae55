"""`twotower evaluate`: what a checkpoint keeps and how fast it is, task by task."""

import dataclasses
import json
import platform
import sys
from collections.abc import Mapping

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import twotower
from twotower.cli.loading import Loaded, Placement, load
from twotower.cli.machine import describe_cpu
from twotower.engine import GenerateOptions
from twotower.evaluate.decode import Trace
from twotower.evaluate.options import EvalOptions
from twotower.evaluate.references import score_references, summarise_references
from twotower.evaluate.report import write_report
from twotower.evaluate.results import BASELINE, summarise, summarise_traces
from twotower.evaluate.run import Item, Subject, draw_documents, evaluate, warm_up
from twotower.evaluate.sweep import PASS_LIMITS, THRESHOLDS, sweep

SWEEP_SHARE = 4  # one item in so many is swept


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvalOptions, Placement):
    """Quality and speed of a checkpoint, task by task, every mode on the same held-out prompts."""

    threads: int | None = None
    """CPU threads; PyTorch's choice when not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: {self.threads} is too small; use at least 1")


def run(options: EvaluateOptions) -> int:
    """Evaluate, print, write; returns the exit status. Errors of the user arrive as ValueError."""
    results, items = run_suite(options)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {**results, "items": [item.to_dict() for item in items]}
        (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        write_report(record, options.out)
    if options.json:
        print(json.dumps(results))
    else:
        print_results(results, Console())
    return 0


def run_suite(options: EvaluateOptions) -> tuple[dict[str, object], list[Item]]:
    """The results record (without its items) and the items."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load_subject(options)
    subject = make_subject(options, loaded)
    documents = draw_documents(options.category_names, options.items, options.seed)
    swept = documents[::SWEEP_SHARE] if options.sweep else []
    scored = documents if options.likelihood else []
    points = len(THRESHOLDS) + len(PASS_LIMITS)
    traces = {mode: Trace() for mode in subject.options}
    items, records, references = [], [], []
    with progress_bar(len(documents) + points * len(swept) + len(scored)) as bar:
        task = bar.task_ids[0]
        warm_up(subject, documents[0])
        for item in evaluate(subject, documents, options.batch_size, traces):
            items.append(item)
            bar.update(task, advance=1, description=item.document.category)
        if swept:
            for record in sweep(subject, swept, options.batch_size, options.seed):
                records.append(record)
                bar.update(task, advance=len(swept), description="sweep")
        for reference in score_references(loaded.model, subject.tokenizer, scored, options.seed):
            references.append(reference)
            bar.update(task, advance=1, description="likelihood")
    modes = list(subject.options)
    results = {
        **describe_run(options, loaded, subject),
        **summarise(items, modes, options.seed),
        "sweep": records,
        "likelihood": summarise_references(references) if references else None,
        "traces": summarise_traces(traces),
    }
    return results, items


def load_subject(options: EvaluateOptions) -> Loaded:
    """The model with all towers that the modes need; ValueError if it has no tokenizer."""
    wanted = next((mode for mode in options.mode_names if mode != "ar"), "ar")
    placement = Placement(
        dtype=options.dtype,
        context_device=options.context_device,
        denoiser_device=options.denoiser_device,
    )
    loaded = load(options.model, GenerateOptions(mode=wanted), placement)  # type: ignore[arg-type]  # checked
    if loaded.tokenizer is None:
        raise ValueError(
            f"model: {options.model} has no tokenizer.json; add the one it was made for"
        )
    return loaded


def make_subject(options: EvaluateOptions, loaded: Loaded) -> Subject:
    """Each mode's options: the checkpoint's defaults under what was asked for."""
    assert loaded.tokenizer is not None
    if options.sweep and not {"ar", "diffusion"} <= set(options.mode_names):
        raise ValueError("sweep: needs the modes ar and diffusion; add them to --modes")
    asked = {
        name: value
        for name in ("confidence_threshold", "steps_per_block")
        if (value := getattr(options, name)) is not None
    }
    if asked and "diffusion" not in options.mode_names:
        raise ValueError(f"{next(iter(asked))}: no effect without diffusion among --modes")
    defaults = {"block_size": loaded.model.config.block_size, **loaded.model.generation_defaults}
    chosen = {}
    for mode in options.mode_names:
        given = {"mode": mode, "max_new_tokens": options.max_new_tokens}
        if mode == "diffusion":
            given |= asked
        # GenerateOptions checks names and values itself.
        chosen[mode] = GenerateOptions(**given).with_defaults(defaults)  # type: ignore[arg-type]
    return Subject(model=loaded.model, tokenizer=loaded.tokenizer, options=chosen)


def describe_run(options: EvaluateOptions, loaded: Loaded, subject: Subject) -> dict[str, object]:
    """What was measured, with which options and versions, on what."""
    return {
        "suite": options.suite,
        "items_per_category": options.items,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "model": {
            "path": loaded.name,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
        },
        "versions": {
            "twotower": twotower.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": describe_cpu(),
        },
        "device": {"context": options.context_device, "denoiser": options.denoiser_device},
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "options": {mode: dataclasses.asdict(o) for mode, o in subject.options.items()},
    }


def progress_bar(total: int) -> Progress:
    """One task on stderr, shown only at a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()
    )
    bar.add_task("warm-up", total=total)
    return bar


def print_results(results: Mapping[str, object], console: Console) -> None:
    """A table per category and one for all."""
    categories, modes = results["categories"], results["modes"]
    assert isinstance(categories, dict) and isinstance(modes, dict)
    for name, measured in {**categories, "all": modes}.items():
        console.print(mode_table(name, measured))
    if (likelihood := results["likelihood"]) is not None:
        assert isinstance(likelihood, dict)
        console.print(likelihood_table(likelihood))
    if BASELINE not in modes:
        console.print("No retention and no speed ratio: ar is not among the modes.")


COLUMNS = ("acc %", "95 %", "kept %", "95 % ", "tok/NFE", "NFE", "tok/s", "x ar", "loops")


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
            _number(row["tokens_per_nfe"], 2),
            str(row["nfe"]),
            _number(row["tokens_per_s"], 0),
            _number(row["speed_ratio"], 2),
            str(row["degenerate"]),
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
