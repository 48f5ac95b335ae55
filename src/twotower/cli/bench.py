"""`twotower bench`: the race against other programs; `--quality`: the announcement's pair."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

import twotower
from twotower.cli.evaluate import (
    INTERRUPTED,
    EvaluateOptions,
    open_folder,
    open_sandbox,
    progress_bar,
    run_suite,
    say_protection,
)
from twotower.cli.evaluation_tables import describe_range
from twotower.cli.machine import recorded
from twotower.cli.race_tables import print_race
from twotower.engine import defaults_of, resolve_options
from twotower.lab.corpus import CATEGORIES
from twotower.lab.evaluate.suite import make_judge
from twotower.lab.race.contest import Heat
from twotower.lab.race.interference import watch_idle
from twotower.lab.race.limits import Machine, cache_bytes
from twotower.lab.race.options import SHIPPED, RaceOptions
from twotower.lab.race.plots import race_figures
from twotower.lab.race.run import (
    draw_heats,
    enter,
    make_random,
    mode_options,
    record_replays,
    run_entry,
)
from twotower.loading import Loaded, Placement, load, placement_of
from twotower.model.precision import require_plain

RECORD_FILE = "race.json"
PAIR_ITEMS = 50  # per category, of --quality
# Options of a race that --quality has too.
_PAIR_FIELDS = ("model", "items", "seed", "allow_unsandboxed_code")
_LIBRARIES = ("torch", "transformers", "xllamacpp", "gguf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions(RaceOptions, Placement):
    """How fast each of our modes is on the same weights against AR decoding, ours, transformers'
    and llama.cpp's, in one paired run; and which limit each pass is at.
    """

    quality: bool = False
    """Instead: quality kept and wall-clock ratio of diffusion against our own AR decoding of the
    same weights, modes taking turns on every prompt."""
    json: bool = False
    """One JSON object on stdout instead of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Placement.__post_init__(self)
        if self.quality:
            self._require_usual_race()
        for name, value, usual in (
            ("backend", self.backend, "auto"),
            ("quantization", self.quantization, "none"),
            ("expert_storage", self.expert_storage, "memory"),
        ):
            if value != usual and not self.quality:
                raise ValueError(f"{name}: for --quality alone; a race has --engines")

    def _require_usual_race(self) -> None:
        """ValueError for an option of the race, which --quality would not look at."""
        for field in dataclasses.fields(RaceOptions):
            if field.name not in _PAIR_FIELDS and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}: for a race alone, without --quality; "
                    "`twotower evaluate` has more options for quality"
                )


def run(options: BenchOptions) -> int:
    """Measure and print; returns the exit status. Errors of the user arrive as ValueError."""
    if options.quality:
        return run_pair(options)
    if options.out is not None:
        open_folder(options.out)
        if find_spec("matplotlib") is None:
            raise ImportError('matplotlib is not installed: pip install "twotower[eval]"')
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    record = run_race(options)
    if options.out is not None:
        write_record(record, options.out)
    if options.json:
        print(json.dumps(record))
    else:
        console = Console()
        # Wide tables go whole into a file; a terminal has the width that it has.
        print_race(record, console if console.is_terminal else Console(width=120))
    return 0 if record["complete"] else INTERRUPTED


def run_race(options: BenchOptions) -> dict[str, object]:
    """The record of every size; after Ctrl-C, of those that were finished."""
    warnings = watch_idle()
    sandbox = open_sandbox(CATEGORIES, options.allow_unsandboxed_code)
    loaded = load(placement_of(options, backend="eager"), "diffusion")
    require_plain(loaded.model, "a race")
    if loaded.tokenizer is None:
        raise ValueError(
            f"model: {options.model} has no tokenizer.json; add the one it was made for"
        )
    heats, num_long = draw_heats(loaded.tokenizer, options, make_judge(sandbox))
    say_protection(sandbox)
    if num_long:
        warnings.append(
            f"left out for having more than {options.max_prompt_tokens} tokens: {num_long} of "
            f"{num_long + len(heats)} prompts"
        )
    sizes: dict[str, object] = {}
    machine = Machine()
    is_complete = False
    try:
        for size in options.size_names:
            sizes[size], found = run_size(size, loaded, heats, options, machine)
            warnings += found
        is_complete = True
    except KeyboardInterrupt:
        if not sizes:
            raise
    return {"sizes": sizes, **describe_race(options, loaded), "warnings": warnings} | {
        "complete": is_complete
    }


def run_size(
    size: str, loaded: Loaded, heats: Sequence[Heat], options: BenchOptions, machine: Machine
) -> tuple[dict[str, object], list[str]]:
    """One size's record and its warnings; a random model repeats what the loaded one commits."""
    model = loaded.model
    assert loaded.tokenizer is not None
    if size != SHIPPED:
        modes = mode_options(options)
        heats = record_replays(loaded.model, heats[: options.replays], modes, options.seed)
        model = make_random(size, loaded.model, options.seed)
    with enter(size, model, heats, options) as entry, progress_bar(len(heats)) as bar:
        return run_entry(
            entry,
            options,
            loaded.tokenizer.decode,
            machine,
            lambda name: bar.update(bar.task_ids[0], advance=1, description=name),
        )


def describe_race(options: BenchOptions, loaded: Loaded) -> dict[str, object]:
    """What raced, with which options and versions, on what."""
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name != "out"}
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
        "versions": {
            "twotower": twotower.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _LIBRARIES},
        },
        "machine": {
            "platform": platform.platform(),
            "cache_bytes": cache_bytes(),
        },
    }


def write_record(record: Mapping[str, object], folder: Path) -> None:
    """race.json and its pictures as PNG files."""
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    for name, figure in race_figures(record).items():
        figure.savefig(folder / f"{name}.png", dpi=150)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def run_pair(options: BenchOptions) -> int:
    """Measure and print quality kept and speed ratio; returns the exit status."""
    results, _ = run_suite(
        EvaluateOptions(
            items=options.items or PAIR_ITEMS,
            seed=options.seed,
            allow_unsandboxed_code=options.allow_unsandboxed_code,
            **dataclasses.asdict(placement_of(options)),
        )
    )
    modes = results["modes"]
    assert isinstance(modes, dict)
    record = {name: value for name, value in results.items() if name not in ("sweep", "traces")}
    if options.json:
        print(json.dumps(record))
    else:
        for mode in ("diffusion", "speculative"):
            Console().print(summary(mode, modes[mode], modes["ar"]), highlight=False)
    return 0 if results["complete"] else INTERRUPTED


def summary(mode: str, ours: dict[str, object], ar: dict[str, object]) -> str:
    """The pair of one mode in two sentences, with what it was bought with."""
    retention, ratio = ours["retention"], ours["speed_ratio"]
    if retention is None:
        return "The AR baseline answers nothing right: there is no quality to keep."
    if ratio is None:
        return "A mode wrote no tokens: there is no speed to compare."
    low, high = describe_quartiles(ours["speed_ratio_quartiles"])
    passes = ours["tokens_per_nfe"]
    return (
        f"{mode} keeps {100 * float(str(retention)):.1f} % of the AR quality "
        f"(95 %: {describe_range(ours['retention_interval'])}) "
        f"at {float(str(ratio)):.2f} times its speed (median of pairs; quartiles {low}, {high}).\n"
        f"AR {ar['correct']} of {ar['n']} right; {mode} {ours['correct']} of {ours['n']}, "
        f"{ours['same_as_ar']} texts equal to AR's, {ours['nfe']} NFE, "
        f"{'no' if passes is None else f'{float(str(passes)):.2f}'} tokens/NFE."
    )


def describe_quartiles(bounds: object) -> tuple[str, str]:
    assert isinstance(bounds, list)
    low, high = bounds
    return f"{low:.2f}", f"{high:.2f}"
