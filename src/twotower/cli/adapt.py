"""`twotower adapt`: a thin denoiser for the model you have, in one command."""

import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Literal, TypeVar

import torch.distributed as dist
import tyro

from twotower.adapt import run as stages
from twotower.adapt.answers import Question, read_answers
from twotower.adapt.budget import STAGES, Budget, Progress
from twotower.adapt.estimate import estimate
from twotower.adapt.files import reading, write_whole
from twotower.adapt.options import AnswerOptions, StepOptions, ThinOptions, WorkFolder
from twotower.adapt.report import Pair, by_task, compare
from twotower.backends import accelerate
from twotower.checkpoint.denoiser import is_denoiser, load_denoiser
from twotower.checkpoint.files import SHIPPED
from twotower.cli.progress import load_with_bar, progress_bar
from twotower.cli.questions import Question as Asked
from twotower.cli.questions import question_encoder, read_questions, tell_left_out
from twotower.cli.tables import make_console, print_table
from twotower.families import read_config
from twotower.file_lock import only_writer
from twotower.lab.report import Table
from twotower.loading import Loaded, Placement, placement_of, settled_quantization
from twotower.memory import lacking_memory

T = TypeVar("T")
_MEASURED = 200  # prompts that are kept to measure, at most
_MIN_PROMPTS = next(n for n in count() if n - n // 10 >= stages.MIN_ANSWERS)
_LINE_EVERY_S = 30.0  # where there is no terminal


@dataclass(frozen=True, kw_only=True)
class AdaptArguments(ThinOptions, AnswerOptions, StepOptions, Placement):
    """Train a thin denoiser for your model: it drafts, the model verifies, and the text stays the
    model's own.

    The model answers the prompts, a denoiser learns to draft the answers, and the speed-up is
    measured on held-out prompts. Run the same command again to resume a run.
    """

    model: str = dataclasses.field()
    """Checkpoint folder, GGUF file or hub id owner/name. shipped: the small model inside this
    package, which has a denoiser."""
    prompts: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
    """Questions like those that the model will get. .jsonl: one object a line with a prompt,
    question, instruction, text, turns, messages or conversations; any other file: one prompt a
    line."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the denoiser, for --denoiser DIR of the other verbs."""
    minutes: float = 60.0
    """Time for the whole run: two fifths for answers, a twentieth to measure, the rest to train."""
    stage: Literal["all", "answers", "train", "measure"] = "all"
    """Run one stage alone, from the files of the stages before it."""
    work: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of answers, features and checkpoints. Default: OUTPUT-work."""
    plain_prompts: tyro.conf.FlagCreatePairsOff[bool] = False
    """Give the model the prompts as they are, without its chat template."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The report as one JSON object on stdout instead of a table."""
    # A denoiser is trained on the device of the model.
    denoiser_device: Annotated[str | None, tyro.conf.Suppress] = None

    def __post_init__(self) -> None:
        for part in (ThinOptions, AnswerOptions, StepOptions, Placement):
            part.__post_init__(self)
        Budget(minutes=self.minutes)
        if self.json and self.stage not in ("all", "measure"):
            raise ValueError(f"json: has no effect with stage={self.stage}; leave it out")


def run(options: AdaptArguments) -> int:
    """All stages, or one; returns the exit status. Errors of the user arrive as ValueError."""
    if dist.is_torchelastic_launched():
        raise ValueError("adapt runs in one process; start it without torchrun")
    began = time.monotonic()
    quantization = settled_quantization(options, options.find())
    options = dataclasses.replace(options, quantization=quantization)
    work = _places(options)
    thin = _part(options, ThinOptions)
    answers, steps = _part(options, AnswerOptions), _part(options, StepOptions)
    # No denoiser yet: its drafts are to be made.
    placement = placement_of(options, denoiser=None)
    stages.reads_of(read_config(placement.find()), thin)  # before prompts and weights are read
    _require_writable(output=options.output.resolve(), work=work.path)
    prompts = read_questions(options.prompts)
    with only_writer(work.path):
        loading = time.monotonic()
        loaded = load_with_bar(placement, "ar")
        load_s = time.monotonic() - loading
        source = _source(work, options)
        model = loaded.model
        first = stages.first_denoiser(model, thin, steps.seed)  # or why there can be none
        questions, held = _questions(prompts, loaded, options, work)
        longest = max(len(question.prompt) for question in questions) + options.max_new_tokens
        if lack := lacking_memory(model.context_device, model.token_bytes, longest):
            raise ValueError(
                f"max_new_tokens={options.max_new_tokens}: an answer needs {lack}; use fewer"
            )
        is_all = options.stage == "all"
        wanted = STAGES if is_all else (options.stage,)
        budget = Budget(
            minutes=options.minutes,
            overhead_s=time.monotonic() - began + load_s,
            began=began if is_all else None,
            load_s=load_s,
        )
        if is_all and not work.spent.is_file():
            said = estimate(model, first, thin, answers, steps, budget, questions)
            print(said, file=sys.stderr)
        del first  # its memory is for the stages
        work.path.mkdir(exist_ok=True)
        write_whole(work.source, source)
        try:
            if "answers" in wanted:
                _show(stages.collect_answers(model, questions, work, thin, answers, budget))
            if "train" in wanted:
                out, path = options.output, Path(loaded.name)
                name = path.name if path.exists() else loaded.name  # not where it lies here
                _show(stages.train(model, work, thin, steps, budget, out, name))
            if "measure" in wanted:
                _report(options, loaded, held, budget)
        except KeyboardInterrupt:
            kept = f"{work.path} keeps what was done, but for the last minute of training"
            print(f"interrupted: {kept}; the same command continues", file=sys.stderr)
            raise
    return 0


def _places(options: AdaptArguments) -> WorkFolder:
    """The folder of work. ValueError where it, or that of the denoiser, holds other files: a run
    writes over them in the end.
    """
    out = options.output.resolve()
    work = WorkFolder(options.work or out.with_name(f"{out.name}-work"))
    for name, path, is_ours in (
        ("output", out, is_denoiser(out)),
        ("work", work.path, work.source.is_file() and work.path.resolve() != out),
    ):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{name}: {path} is a file; give a folder")
        if path.is_dir() and any(path.iterdir()) and not is_ours:
            raise ValueError(f"{name}: {path} holds other files; give a new or empty folder")
    if work.path.resolve() == out:
        raise ValueError(f"work: {work.path} is the folder of the denoiser; give another")
    return work


def _require_writable(**folders: Path) -> None:
    """ValueError, by the flag, where a folder could not be made at the end of a run."""
    for name, path in folders.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            reason = f"its parent cannot be written ({error.strerror})"
            raise ValueError(f"{name}: {path}: {reason}; give another folder") from None


def _part(options: AdaptArguments, kind: type[T]) -> T:
    """The options of one stage."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # a dataclass
    return kind(**{name: getattr(options, name) for name in names})


def _source(work: WorkFolder, options: AdaptArguments) -> str:
    """What makes a folder's answers what they are. ValueError where it has answers of another
    model, or otherwise made.
    """
    name = options.name
    source = {
        "model": str(Path(name).resolve()) if Path(name).exists() else name,
        "quantization": options.quantization,
        "plain_prompts": options.plain_prompts,
        "temperature": options.temperature,
    }
    if read_answers(work.answers):
        with reading(work.source, "give another --work"):
            known = dict(json.loads(work.source.read_text()))
        for key, value in source.items():
            if known.get(key) != value:
                raise ValueError(
                    f"work: {work.path} has answers with {key}={known.get(key)}, not {value}; give "
                    "the same, or another folder"
                )
    return json.dumps(source) + "\n"


def _questions(
    prompts: Sequence[Asked], loaded: Loaded, options: AdaptArguments, work: WorkFolder
) -> tuple[list[Question], list[Question]]:
    """The prompts as token ids in a random order, each once, through the model's chat template
    where it has one: those to answer, and those that are kept to measure, of which none was
    answered before. Blank ones and too long ones are left out; ValueError where too few are left.
    """
    encode = question_encoder(loaded, "adapt", options.plain_prompts or loaded.name == SHIPPED)
    order = random.Random(options.seed).sample(range(len(prompts)), len(prompts))
    found: dict[tuple[int, ...], Question] = {}
    for number in order:
        asked = prompts[number]
        ids = encode(asked.text, asked.where)
        if 0 < len(ids) <= options.max_prompt_tokens:
            found.setdefault(tuple(ids), Question(number=number, prompt=ids, task=asked.task))
    usable = list(found.values())
    kept = min(_MEASURED, len(usable) // 10)
    left_out = f"blank and repeated ones, and those of more than {options.max_prompt_tokens} tokens"
    if len(usable) - kept < stages.MIN_ANSWERS:
        raise ValueError(
            f"prompts: {len(usable)} of {len(prompts)} are usable, at least {_MIN_PROMPTS} are "
            f"needed; left out are {left_out}"
        )
    tell_left_out(len(usable), len(prompts), left_out)
    trained = {tuple(answer.prompt) for answer in read_answers(work.answers)}
    return usable[kept:], [q for q in usable[:kept] if tuple(q.prompt) not in trained]


def _show(progress: Iterator[Progress]) -> None:
    """A stage's progress on stderr: a bar with the time left, or a line now and then."""
    told: Progress | None = None
    last: Progress | None = None
    with progress_bar("words", has_count=False) as bar:
        task = bar.add_task("", total=None, words="")
        for last in progress:
            bar.update(
                task, description=last.stage, completed=last.seconds, total=last.of_seconds,
                words=last.words,
            )  # fmt: skip
            if bar.disable and (told is None or last.seconds - told.seconds > _LINE_EVERY_S):
                told = last
                print(_line(last), file=sys.stderr, flush=True)
    if bar.disable and last is not None and last is not told:
        print(_line(last), file=sys.stderr, flush=True)


def _line(progress: Progress) -> str:
    left = max(0.0, progress.of_seconds - progress.seconds)
    time_left = f"{left / 60:.0f} min" if left >= 100 else f"{left:.0f} s"
    return f"{progress.stage}: {progress.words}, {time_left} left"


def _report(
    options: AdaptArguments, loaded: Loaded, held: Sequence[Question], budget: Budget
) -> None:
    """Stage measure: the table, or the object, of what the denoiser is worth by task."""
    if not held:
        raise ValueError(
            "prompts: all that were kept to measure have been trained on; give those of the "
            "earlier runs, with the same seed"
        )
    if not is_denoiser(options.output):
        raise ValueError(f"output: {options.output} has no denoiser; run the stage train first")
    quantization = settled_quantization(options, loaded.folder)
    model = accelerate(
        load_denoiser(loaded.model, options.output),
        options.backend,
        quantization,
        options.kv_cache_dtype,
    )
    pairs = list[Pair]()
    compared = compare(loaded.model, model, held, options.max_new_tokens)
    _show(stages.measured(compared, budget, len(held), pairs))
    results = by_task(pairs)
    report = {
        "model": loaded.name,
        "denoiser": str(options.output),
        "minutes": options.minutes,
        "tasks": [vars(result) for result in results],
    }
    write_whole(options.output / "report.json", json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps(report))
        return
    rows = [
        [r.task, str(r.prompts), str(r.equal), f"{r.tokens_per_cycle:.2f}", f"{r.speedup:.2f}"]
        for r in results
    ]
    columns = ["task", "prompts", "texts equal", "tokens a cycle", "x AR"]
    print_table(make_console(), Table(f"{loaded.name} with {options.output}", columns, rows))
    usual = dataclasses.replace(options, quantization="auto")
    is_usual = quantization == settled_quantization(usual, loaded.folder)
    flags = "" if is_usual else f" --quantization {quantization}"
    print(f"\ntwotower chat --model {loaded.name} --denoiser {options.output}{flags}")
