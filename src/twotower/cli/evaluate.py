"""`twotower evaluate`: what a checkpoint keeps and how fast it is, task by task."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from twotower.checkpoint.empty import count_parameters
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
from twotower.cli.progress import progress_bar
from twotower.cli.tables import make_console, print_table
from twotower.engine import GenerateOptions, defaults_of, resolve_options
from twotower.lab.corpus import Document
from twotower.lab.evaluate.likelihood import Reference, score_references, summarise_references
from twotower.lab.evaluate.report import LEGEND, headline, tables, write_report
from twotower.lab.evaluate.results import settings, summarise, summarise_traces, sweep
from twotower.lab.evaluate.run import (
    EvaluationOptions,
    Item,
    Subject,
    Trace,
    draw_groups,
    evaluate,
    warm_up,
)
from twotower.lab.evaluate.suite import Judge, make_judge
from twotower.loading import Loaded, Placement, load, placement_of

SWEEP_SHARE = 4  # the first of so many parts of each category is swept


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluationOptions, Placement):
    """Measure quality and speed of a checkpoint by task and mode, on the same held-out prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Placement.__post_init__(self)


@dataclasses.dataclass(kw_only=True)
class Findings:
    """What a run has found so far."""

    traces: dict[str, Trace]
    items: list[Item] = dataclasses.field(default_factory=list)
    sweep: list[dict[str, object]] = dataclasses.field(default_factory=list)
    references: list[Reference] = dataclasses.field(default_factory=list)
    is_complete: bool = False


def run(options: EvaluateOptions) -> int:
    """Evaluate, print, write; returns the exit status. Errors of the user arrive as ValueError."""
    if options.output is not None:
        open_folder(options.output)
        require_library("matplotlib")
    results, items = run_suite(options)
    if options.output is not None:
        write_report({**results, "items": [item.to_dict() for item in items]}, options.output)
    if options.json:
        print(json.dumps(results))
    else:
        print_results(results)
    return 0 if results["complete"] else INTERRUPTED


def print_results(results: Mapping[str, Any]) -> None:
    """A table per category and one for all, the sweep, the likelihoods; then the pair in words."""
    console = make_console()
    overall, *others = tables(results, digits=0)
    count = len(results["categories"])
    for table in [*others[:count], overall, *others[count:]]:
        print_table(console, table)
    console.print(f"\n{LEGEND}\n\n{headline(results)}")


def run_suite(options: EvaluateOptions) -> tuple[dict[str, object], list[Item]]:
    """The results record (without its items) and the items; after Ctrl-C, of what was measured."""
    if "tools" in options.category_names:
        require_library("jsonschema")
    sandbox = open_sandbox(options.category_names, options.allow_unsandboxed_code)
    options = options.for_model(has_any_denoiser(options))
    chosen = mode_options(options)
    loaded = load_subject(options)
    assert loaded.tokenizer is not None
    subject = Subject(model=loaded.model, tokenizer=loaded.tokenizer, options=chosen)
    groups = draw_groups(options.category_names, options.items, options.seed, options.batch_size)
    say_protection(sandbox)
    findings = Findings(traces={mode: Trace() for mode in subject.options})
    try:
        collect(options, subject, groups, make_judge(sandbox), findings)
    except KeyboardInterrupt:
        if not findings.items:
            raise
        done, total = len(findings.items), sum(map(len, groups))
        print(f"interrupted: results of {done} of {total} items", file=sys.stderr)
    references = findings.references
    results = {
        **describe_run(options, loaded, subject),
        "sandbox": None if sandbox is None else sandbox.protection,
        "complete": findings.is_complete,
        **summarise(findings.items, list(subject.options), options.seed),
        "sweep": findings.sweep,
        "likelihood": summarise_references(references) if references else None,
        "traces": summarise_traces(findings.traces),
    }
    return results, findings.items


def collect(
    options: EvaluateOptions,
    subject: Subject,
    groups: Sequence[Sequence[Document]],
    judge: Judge,
    findings: Findings,
) -> None:
    """Run everything that was asked for, showing progress; `findings` fills as it goes."""
    documents = [document for group in groups for document in group]
    scored = documents if options.likelihood else []
    rounds = len(groups) // len(options.category_names)
    num_swept = -(-rounds // SWEEP_SHARE) * len(options.category_names) if options.sweep else 0
    swept = groups[:num_swept]
    advance = sum(map(len, swept))
    points = len(settings(subject)) if swept else 0
    with progress_bar() as bar:
        total = len(documents) + points * advance + len(scored)
        task = bar.add_task("warm-up", total=total)
        warm_up(subject, documents[0])
        for item in evaluate(subject, groups, findings.traces, judge):
            findings.items.append(item)
            bar.update(task, advance=1, description=item.document.category)
        for record in sweep(subject, swept, judge, options.seed) if swept else ():
            findings.sweep.append(record)
            bar.update(task, advance=advance, description="sweep")
        for reference in score_references(subject.model, subject.tokenizer, scored, options.seed):
            findings.references.append(reference)
            bar.update(task, advance=1, description="likelihood")
    findings.is_complete = True


def load_subject(options: EvaluateOptions) -> Loaded:
    """The model with all towers that the modes need; ValueError if it has no tokenizer."""
    wanted = next((mode for mode in options.mode_names if mode != "ar"), "ar")
    loaded = load(placement_of(options), wanted)
    loaded.need_tokenizer()
    return loaded


def mode_options(options: EvaluationOptions) -> dict[str, GenerateOptions]:
    """Each mode's options: what was asked for."""
    if options.sweep and not {"ar", "diffusion"} <= set(options.mode_names):
        raise ValueError("sweep: needs the modes ar and diffusion; add them to --modes")
    asked = {
        name: value
        for name in ("confidence_threshold", "steps_per_block", "first_token", "verify_threshold")
        if (value := getattr(options, name)) is not None
    }
    if asked and "diffusion" not in options.mode_names:
        raise ValueError(f"{next(iter(asked))}: no effect without diffusion among --modes")
    chosen = {}
    for mode in options.mode_names:
        given = {"mode": mode, "max_new_tokens": options.max_new_tokens}
        if mode == "diffusion":
            given |= asked
        # GenerateOptions checks names and values itself.
        chosen[mode] = GenerateOptions(**given)  # type: ignore[arg-type]
    return chosen


def describe_run(options: EvaluateOptions, loaded: Loaded, subject: Subject) -> dict[str, object]:
    """What was measured, with which options and versions, on what."""
    return {
        "recorded": recorded(),
        "items_per_category": options.items,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "model": {
            "path": loaded.name,
            "parameters": count_parameters(loaded.model),
        },
        "versions": describe_versions(),
        "device": {
            "context": str(loaded.model.context_device),
            "denoiser": str(loaded.model.denoiser_device),
        },
        "dtype": str(loaded.model.context_tower.embeddings.weight.dtype).removeprefix("torch."),
        "backend": loaded.model.backend.name,
        "quantization": options.quantization,
        "threads": torch.get_num_threads(),
        "options": {
            mode: dataclasses.asdict(resolve_options(o, defaults_of(loaded.model)))
            for mode, o in subject.options.items()
        },
    }
