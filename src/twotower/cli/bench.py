"""`twotower bench`: our modes against AR decoding of the same weights, by us and by others; on a
real model as a contest of processes, with prompts from files in its chat template.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro

from twotower.backends import BackendName, Quantization
from twotower.checkpoint import load_checkpoint
from twotower.checkpoint.files import SHIPPED
from twotower.cli.decoding import has_any_denoiser
from twotower.cli.machine import recorded
from twotower.cli.measuring import (
    INTERRUPTED,
    describe_versions,
    open_folder,
    open_sandbox,
    require_library,
    say_protection,
)
from twotower.cli.progress import load_with_bar, progress_bar
from twotower.cli.questions import question_encoder, read_questions, tell_left_out
from twotower.cli.tables import make_console, print_table
from twotower.engine import defaults_of, resolve_options
from twotower.lab.bench.contest import contest_table, contestants, run_contest, summarise
from twotower.lab.bench.limits import cache_bytes
from twotower.lab.bench.replay import make_random
from twotower.lab.bench.report import bench_figures, describe_break_even, tables
from twotower.lab.bench.run import (
    MeasureOptions,
    draw_prompts,
    measure_size,
    mode_options,
    record_replays,
    watch_idle,
)
from twotower.lab.bench.runners import TimedPrompt, refuse_impossible
from twotower.lab.corpus import CATEGORIES
from twotower.lab.evaluate.run import draw_groups, split_names
from twotower.lab.evaluate.suite import make_judge
from twotower.lab.report import Record, Table, to_png, write_files
from twotower.loading import Loaded, Placement, outline, placement_of, settled_quantization
from twotower.model.precision import ExpertStorage, require_plain

RECORD_FILE = "bench.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(MeasureOptions, Placement):
    """Measure the speed of each decoding mode against AR decoding of the same weights by twotower,
    transformers and llama.cpp, in paired runs, and what bounds each forward pass: bandwidth or
    arithmetic.
    """

    json: bool = False
    """Print one JSON object instead of text."""
    expert_storage: Annotated[ExpertStorage, tyro.conf.Suppress] = "memory"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.placement()  # or what is wrong with it

    def placement(self) -> Placement:
        """Where the weights are loaded that all engines are made of."""
        return placement_of(self, backend="eager", quantization="none", kv_cache_dtype="auto")


def run(options: BenchOptions) -> int:
    """Measure and print; returns the exit status. Errors of the user arrive as ValueError."""
    if options.output is not None:
        open_folder(options.output)
        require_library("matplotlib")
    if is_contest := bool(options.prompts) or not has_any_denoiser(options):
        refuse_unused(options)
    elif options.kv_cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype={options.kv_cache_dtype}: is measured on a real model alone, with "
            "prompts or without a denoiser; leave it out"
        )
    refuse_impossible(options.find(), *_compared(options, is_contest), options.kv_cache_dtype)
    if is_contest:
        record = measure_contest(options, outline(options.placement()))
    else:
        record = measure(options, load_with_bar(options.placement(), "diffusion"))
    if options.output is not None:
        figures = {} if is_contest else bench_figures(record)
        pictures = {name: to_png(figure) for name, figure in figures.items()}
        write_files(options.output, RECORD_FILE, record, pictures, None)
    if options.json:
        print(json.dumps(record))
    elif is_contest:
        title = f"{record['model']}: {record['prompts']} prompts, {record['threads']} threads"
        table = contest_table(record["contestants"], title)
        print_tables([table], record["missing"], record["warnings"])
    else:
        print_bench(record)
    return 0 if record["complete"] else INTERRUPTED


def _compared(
    options: BenchOptions, is_contest: bool
) -> tuple[Sequence[BackendName], Sequence[Quantization]]:
    named = options.backend if options.backend == "native" else "auto"
    place = placement_of(options, backend=named, quantization="auto")
    usual = settled_quantization(place, options.find())
    return options.pairs(is_contest, usual == "gguf" and options.backend in ("auto", "native"))


def refuse_unused(options: BenchOptions) -> None:
    """ValueError for options of the benchmark of the shipped sizes."""
    others = ("sizes", "modes", "baselines", "replays", "repeats")
    usual = BenchOptions()
    for name in others:
        if getattr(options, name) != getattr(usual, name):
            raise ValueError(f"{name}: has no effect on a real model; leave it out")


def print_bench(record: Record) -> None:
    """Costs, passes and break-even of every size; then what was missing or doubtful."""
    sizes = record["sizes"].items()
    missing = dict.fromkeys(line for _, found in sizes for line in found["missing"])
    notes = [
        describe_break_even(engine, pays, found)
        for _, found in sizes
        for engine, pays in found["pays"].items()
    ]
    found = [table for size, one in sizes for table in tables(size, one)]
    print_tables(found, missing, record["warnings"], notes)


def print_tables(
    found: Sequence[Table],
    missing: Iterable[str],
    warnings: Sequence[str],
    notes: Sequence[str] = (),
) -> None:
    """Tables, what they say in words, and what was missing or doubtful."""
    console = make_console()
    for table in found:
        print_table(console, table)
    console.print()
    for line in (
        *notes,
        *(f"not measured: {line}" for line in missing),
        *(f"warning: {line}" for line in warnings),
    ):
        console.print(line)


def measure(options: BenchOptions, loaded: Loaded) -> dict[str, Any]:
    """The record of every size; after Ctrl-C, of those that were finished."""
    warnings = watch_idle()
    sandbox = open_sandbox(CATEGORIES, options.allow_unsandboxed_code)
    require_plain(loaded.model, "bench")
    prompts, num_long = draw_prompts(loaded.need_tokenizer(), options, make_judge(sandbox))
    say_protection(sandbox)
    if num_long:
        warnings.append(
            f"left out for having more than {options.max_prompt_tokens} tokens: {num_long} of "
            f"{num_long + len(prompts)} prompts"
        )
    sizes: dict[str, object] = {}
    is_complete = False
    try:
        for size in split_names(options.sizes):
            sizes[size], found = _measure_size(size, loaded, prompts, options)
            warnings += found
        is_complete = True
    except KeyboardInterrupt:
        if not sizes:
            raise
    return {"sizes": sizes, **describe_run(options, loaded)} | {
        "sandbox": None if sandbox is None else sandbox.protection,
        "warnings": warnings,
        "complete": is_complete,
    }


def _measure_size(
    size: str, loaded: Loaded, prompts: Sequence[TimedPrompt], options: BenchOptions
) -> tuple[dict[str, object], list[str]]:
    """A random model repeats what the loaded one commits."""
    model = loaded.model
    if size != SHIPPED:
        modes = mode_options(options)
        prompts = record_replays(loaded.model, prompts[: options.replays], modes, options.seed)
        model = make_random(size, loaded.model, options.seed)
    with progress_bar() as bar:
        task = bar.add_task("warm-up", total=len(prompts))
        advance = partial(bar.update, task, advance=1, description=size)
        decode = loaded.need_tokenizer().decode
        return measure_size(size, model, prompts, options, decode, advance)


def describe_run(options: BenchOptions, loaded: Loaded) -> dict[str, object]:
    """What was measured, with which options and versions, on what."""
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    return {
        "recorded": recorded(),
        "model": loaded.name,
        "options": asked,
        "mode_options": {
            str(o.mode): dataclasses.asdict(resolve_options(o, defaults_of(loaded.model)))
            for o in mode_options(options)
        },
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "seed": options.seed,
        "versions": describe_versions("transformers", "xllamacpp", "gguf"),
        "cache_bytes": cache_bytes(),
    }


def measure_contest(options: BenchOptions, loaded: Loaded) -> dict[str, Any]:
    """The record of a contest. loaded: without values; other processes have those."""
    prompts = encode_questions(loaded, options)
    threads, given = torch.get_num_threads(), Path(options.model or "")
    context = max(map(len, prompts)) + options.max_new_tokens
    file = given if given.is_file() else loaded.folder
    with (
        TemporaryDirectory(prefix="twotower-contest-") as name,
        progress_bar(is_kept=False) as bar,
    ):
        task = bar.add_task("files for the others", total=None)
        weights = partial(load_checkpoint, loaded.folder, dtype=None, towers="context")
        who, missing = contestants(
            weights,
            file,
            _compared(options, is_contest=True),
            threads,
            context,
            Path(name),
            options.denoiser,
            options.kv_cache_dtype,
        )
        warnings = watch_idle()
        bar.reset(task, total=len(who) * (1 + len(prompts)))

        def show(what: str) -> None:
            bar.update(task, advance=1, description=what)

        answers, more = run_contest(who, prompts, options.max_new_tokens, show)
    return {
        "recorded": recorded(),
        "model": loaded.name,
        "threads": threads,
        "prompts": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "warnings": warnings,
        "versions": describe_versions("transformers", "xllamacpp", "gguf"),
        "contestants": summarise(answers, prompts),
        "missing": [*missing, *more],
        "complete": True,
    }


def encode_questions(loaded: Loaded, options: BenchOptions) -> list[list[int]]:
    """Token ids of the questions of the files, or of the suite."""
    encode = question_encoder(loaded, "bench on a real model", is_plain=False)
    if options.prompts:
        asked = [encode(q.text, q.where) for q in read_questions(options.prompts, options.items)]
    else:
        groups = draw_groups(CATEGORIES, options.items, options.seed, 1)
        asked = [encode(document.prompt, "suite") for group in groups for document in group]
    most = options.max_prompt_tokens
    kept = [ids for ids in asked if 0 < len(ids) <= most]
    if not kept:
        raise ValueError(f"max_prompt_tokens: {most} leaves out every prompt; use more")
    tell_left_out(len(kept), len(asked), f"blank ones, and those of more than {most} tokens")
    return kept
