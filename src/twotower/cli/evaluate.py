"""`twotower evaluate`: what a checkpoint keeps and how fast it is, task by task."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch

from twotower.arguments import COUNT, INDEX, check_fields, either
from twotower.checkpoint.empty import count_parameters
from twotower.cli.decoding import TextOptions, by_mode, decoding_flags, has_any_denoiser
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
from twotower.cli.tables import make_console, print_table
from twotower.engine import MODES, GenerateOptions, defaults_of, resolve_options
from twotower.engine.resolved import FIELD_MODES, MODES_OF_BACKBONES
from twotower.lab.corpus import CATEGORIES, Document
from twotower.lab.evaluate.likelihood import Reference, score_references, summarise_references
from twotower.lab.evaluate.report import LEGEND, headline, tables, write_report
from twotower.lab.evaluate.results import settings, summarise, summarise_traces, sweep
from twotower.lab.evaluate.run import (
    AUTO,
    Item,
    Subject,
    Trace,
    check_names,
    draw_groups,
    evaluate,
    split_names,
    warm_up,
)
from twotower.lab.evaluate.suite import Judge, make_judge
from twotower.loading import Loaded, Placement, placement_of

# --modes names them; the length and the seed are the suite's; no table shows logprobs.
_LEFT_OUT = ("mode", "max_new_tokens", "seed", "logprobs")
_WITH_DENOISER = ("ar", "diffusion", "speculative")
SWEEP_SHARE = 4  # the first of so many parts of each category is swept


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TextOptions, Placement):
    """Measure quality and speed of a checkpoint by task and mode, on the same held-out prompts.

    A decoding option is given to each of the modes that uses it. Its default is the checkpoint's
    (generation_config.json), else the one shown.
    """

    modes: str = AUTO
    """Decoding modes to compare, separated by commas; ar is the baseline. auto: ar, speculative
    and, if the model has a denoiser, diffusion."""
    categories: str = ",".join(CATEGORIES)
    """Categories of the suite, separated by commas."""
    items: int = 200
    """Held-out prompts per category."""
    max_new_tokens: int = 128
    """Maximum number of new tokens per answer."""
    batch_size: int = 1  # as in EngineOptions
    seed: int = 0
    """Seed of the prompts, of sampled answers and of the bootstrap."""
    sweep: bool = False
    """Also measure diffusion at other values of --confidence-threshold and --steps-per-block, on a
    quarter of the prompts."""
    likelihood: bool = False
    """Also measure the negative log-likelihood of the reference answers: exact for the context
    tower, an upper bound for the denoiser."""
    output: Path | None = None
    """Folder for results.json, report.html and its pictures."""
    json: bool = False
    """Print one JSON object instead of tables."""
    allow_unsandboxed_code: bool = False
    """Run code that the model writes even where this machine has no sandbox for it."""
    escape: bool = False
    r"""Replace \n, \t and \\ in --stop by line break, tab and backslash."""
    decoding: Annotated[dict[str, object], decoding_flags(*_LEFT_OUT)] = dataclasses.field(
        default_factory=dict
    )
    """How to decode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("items", "batch_size", "max_new_tokens")
        check_fields(self, {**dict.fromkeys(counts, COUNT), "seed": INDEX})
        check_names("modes", self.mode_names, MODES)
        check_names("categories", self.category_names, CATEGORIES)
        if self.escape and not self.stop:
            raise ValueError("escape: no effect without --stop; leave it out")

    @property
    def mode_names(self) -> tuple[str, ...]:
        """The modes to compare, those of a model with a denoiser where they are to be found."""
        return _WITH_DENOISER if self.modes == AUTO else split_names(self.modes)

    @property
    def category_names(self) -> tuple[str, ...]:
        """The categories of the suite to measure."""
        return split_names(self.categories)

    def for_model(self, has_denoiser: bool) -> Self:
        """The same with the modes named that the model has, where they are to be found. ValueError
        (one line) for a mode that needs a denoiser, where there is none.
        """
        if has_denoiser:
            return self
        lacking = [mode for mode in self.mode_names if mode not in MODES_OF_BACKBONES]
        if self.modes != AUTO and lacking:
            raise ValueError(
                f"modes: {lacking[0]} needs a denoiser tower, and this model has none; use ar, "
                "speculative or both"
            )
        return dataclasses.replace(self, modes="ar,speculative") if self.modes == AUTO else self

    def by_mode(self) -> dict[str, GenerateOptions]:
        """Each mode's options: what was asked for and it uses."""
        if self.sweep and not {"ar", "diffusion"} <= set(self.mode_names):
            raise ValueError("sweep: needs the modes ar and diffusion; add them to --modes")
        named = self.named(self.decoding, self.escape)
        for name in named:
            users = FIELD_MODES.get(name, MODES)
            if not {*users} & {*self.mode_names}:
                raise ValueError(
                    f"{name}: no effect without {either(users)} among --modes; leave it out"
                )
        given = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        return by_mode(self.mode_names, named | given)


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
    chosen = options.by_mode()
    wanted = next((mode for mode in options.mode_names if mode != "ar"), "ar")
    loaded = load_with_bar(placement_of(options), wanted)  # with all towers that the modes need
    subject = Subject(model=loaded.model, tokenizer=loaded.need_tokenizer(), options=chosen)
    groups = draw_groups(options.category_names, options.items, options.seed, options.batch_size)
    described = describe_run(options, loaded, subject)
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
        **described,
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


def describe_run(options: EvaluateOptions, loaded: Loaded, subject: Subject) -> dict[str, object]:
    """What was measured, with which options and versions, on what."""
    return {
        "recorded": recorded(),
        "items_per_category": options.items,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "model": {"path": loaded.name, "parameters": count_parameters(loaded.model)},
        "versions": describe_versions(),
        "device": {
            "context": str(loaded.model.context_device),
            "denoiser": str(loaded.model.denoiser_device),
        },
        "dtype": str(loaded.model.context_tower.norm_f.weight.dtype).removeprefix("torch."),
        "backend": loaded.model.backend.name,
        "quantization": loaded.model.backend.quantization,
        "threads": torch.get_num_threads(),
        "options": {
            mode: dataclasses.asdict(resolve_options(o, defaults_of(loaded.model)))
            for mode, o in subject.options.items()
        },
    }
