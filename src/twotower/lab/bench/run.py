"""What is measured, with which options, and one size from its prompts to its record."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twotower.arguments import COUNT, INDEX, check_fields
from twotower.backends import BACKENDS, QUANTIZATIONS, BackendName, Quantization
from twotower.checkpoint.files import SHIPPED
from twotower.engine import MODES, GenerateOptions, stream
from twotower.lab.bench.baselines import open_baselines
from twotower.lab.bench.limits import describe_limits, doubt_limits
from twotower.lab.bench.passes import PassShape, draw_ids, time_passes
from twotower.lab.bench.replay import SIZES, record_script
from twotower.lab.bench.results import measure_quality, summarise_measurements, summarise_passes
from twotower.lab.bench.runners import (
    AR,
    BaselineRunner,
    OurRunner,
    Runner,
    TimedPrompt,
    open_engines,
    take_turns,
)
from twotower.lab.corpus import CATEGORIES, Document
from twotower.lab.evaluate.run import AUTO, check_names, draw_groups, split_names
from twotower.lab.evaluate.suite import Judge
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

OUR_MODES = ("ar", "diffusion", "speculative")
REPLAY_PROMPT = 256  # tokens of a prompt at most: its prefill is not what is replayed
_STAT = Path("/proc/stat")
_MAX_OTHERS = 0.07  # cores, on average
_IDLE_S = 1.0  # how long others are watched before the benchmark


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured."""

    sizes: str = SHIPPED
    """Models, separated by commas: shipped (real text); 32M and 160M (random weights that replay
    what the shipped model committed)."""
    modes: str = ",".join(OUR_MODES)
    """Decoding modes, separated by commas; ar must be among them."""
    backend: str = AUTO
    """Backends to compare, separated by commas: eager, native, graphs. auto: eager,native; with
    --prompts the one that suits the model, as in other verbs."""
    quantization: str = AUTO
    """Quantisations to compare, separated by commas: none, int8, int4. Each backend runs those
    that it has. auto: none,int8; with --prompts none,int8,int4, and for a quantised GGUF file gguf,
    its own bits, in which llama.cpp runs the file itself."""
    baselines: bool = True
    """Also measure AR decoding by transformers and llama.cpp, where they are installed."""
    prompts: tuple[Path, ...] = ()
    """Files of prompts to compare on a real model, each engine in a process of its own with the
    same weights in the same quantisation: our modes, llama.cpp, transformers. .jsonl: one object a
    line with a prompt, question, instruction, text or turns; any other file: one prompt a line.
    Models without a denoiser are always measured so."""
    items: int = 10
    """Held-out prompts per category; with --prompts, prompts per file."""
    max_new_tokens: int = 128
    """Maximum number of new tokens per answer."""
    max_prompt_tokens: int = 2048
    """Leave out prompts with more tokens than this."""
    replays: int = 16
    """Recorded answers that each model of random weights replays."""
    repeats: int = 30
    """Timed calls of each kind of forward pass."""
    seed: int = 0
    """Seed of the prompts and of random weights."""
    allow_unsandboxed_code: bool = False
    """Run code that the model writes even where this machine has no sandbox for it."""
    output: Path | None = None
    """Folder for bench.json and its pictures."""

    def __post_init__(self) -> None:
        counts = ("items", "max_new_tokens", "max_prompt_tokens", "replays", "repeats")
        check_fields(self, {**dict.fromkeys(counts, COUNT), "seed": INDEX})
        check_names("sizes", split_names(self.sizes), (SHIPPED, *SIZES))
        check_names("modes", split_names(self.modes), MODES)
        known = {"backend": tuple(b for b in BACKENDS if b != AUTO), "quantization": QUANTIZATIONS}
        for name, choices in known.items():
            if getattr(self, name) != AUTO:
                check_names(name, split_names(getattr(self, name)), choices)
        if AR not in split_names(self.modes):
            raise ValueError(f"modes: {self.modes} lacks ar, which all others are compared with")

    def pairs(
        self, is_contest: bool, is_gguf: bool = False
    ) -> tuple[Sequence[BackendName], Sequence[Quantization]]:
        """Backends and quantisations to compare, on a real model, which may be a quantised GGUF
        file, or on the shipped sizes.
        """
        backend = AUTO if is_contest else "eager,native"
        of_real = "gguf" if is_gguf else "none,int8,int4"
        quantization = of_real if is_contest else "none,int8"
        usual = {"backend": backend, "quantization": quantization}
        names = (
            split_names(text if getattr(self, name) == AUTO else getattr(self, name))
            for name, text in usual.items()
        )
        return tuple(names)  # type: ignore[return-value]  # two of checked names


def draw_prompts(
    tokenizer: Tokenizer, options: MeasureOptions, judge: Judge
) -> tuple[list[TimedPrompt], int]:
    """Held-out prompts of every category in turns, and how many were too long."""
    prompts = [
        TimedPrompt(
            ids=tokenizer.encode_prompt(document.prompt),
            max_new_tokens=options.max_new_tokens,
            is_right=partial(_is_right, judge, document),
        )
        for group in draw_groups(CATEGORIES, options.items, options.seed, 1)
        for document in group
    ]
    kept = [prompt for prompt in prompts if len(prompt.ids) <= options.max_prompt_tokens]
    if not kept:
        raise ValueError(
            f"max_prompt_tokens: {options.max_prompt_tokens} leaves out every prompt; use more"
        )
    return kept, len(prompts) - len(kept)


def _is_right(judge: Judge, document: Document, text: str) -> bool:
    return judge(document, text).correct


def mode_options(options: MeasureOptions) -> list[GenerateOptions]:
    """Each mode's options, else the checkpoint's. Scripts repeat the denoiser's drafts."""
    found = []
    for mode in split_names(options.modes):
        drafts = {"drafts": "denoiser"} if mode == "speculative" else {}
        # GenerateOptions checks the mode itself.
        own = GenerateOptions(mode=mode, max_new_tokens=options.max_new_tokens, **drafts)  # type: ignore[arg-type]
        found.append(own)
    return found


def record_replays(
    model: TwoTower, prompts: Sequence[TimedPrompt], modes: Sequence[GenerateOptions], seed: int
) -> list[TimedPrompt]:
    """Each mode's script on this model, behind random prompts as long as the real ones.

    Prompts are cut to 256 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    replays = []
    for prompt in prompts:
        length = min(len(prompt.ids), REPLAY_PROMPT)
        ids = draw_ids(model, (length,), generator).tolist()
        scripts = {str(o.mode): record_script(stream(model, [prompt.ids], o)) for o in modes}
        replays.append(TimedPrompt(ids=ids, max_new_tokens=prompt.max_new_tokens, scripts=scripts))
    return replays


def measure_size(
    size: str,
    model: TwoTower,
    prompts: Sequence[TimedPrompt],
    options: MeasureOptions,
    decode: Callable[[list[int]], str],
    advance: Callable[[], None],
) -> tuple[dict[str, Any], list[str]]:
    """Measure, time the passes, set both against the limits: a size's record and its warnings."""
    engines, unable = open_engines(model, *options.pairs(is_contest=False))
    shape = PassShape(
        num_past=round(statistics.median(len(prompt.ids) for prompt in prompts)),
        block_size=model.config.block_size,
        repeats=options.repeats,
        seed=options.seed,
    )
    threads, dtype = torch.get_num_threads(), model.context_lm_head.weight.dtype
    wanted = model if options.baselines else None
    with open_baselines(wanted, threads, dtype) as (baselines, missing):
        ours = (OurRunner(n, m, o) for n, m in engines.items() for o in mode_options(options))
        runners: list[Runner] = [*ours, *map(BaselineRunner, baselines)]
        before = take_load()
        rows = []
        for row in take_turns(runners, prompts):
            rows.append(row)
            advance()
        times = time_passes(engines, shape)
        warnings = others_used(before, take_load(), size)
    names = [(runner.engine, runner.mode) for runner in runners]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    record = summarise_measurements(columns, list(engines))
    record |= summarise_passes(times, record["best_ar_decode_ms"], shape.block_size)
    record["limits"] = describe_limits(model, record, shape)
    if size == SHIPPED:
        found = measure_quality(columns, list(engines), prompts, decode)
        for (engine, mode), quality in found.items():
            record["engines"][engine][mode] |= quality
    record |= {
        "model": _describe(model),
        "num_past": shape.num_past,
        "is_replay": size != SHIPPED,
        "missing": [*unable, *missing],
    }
    return record, warnings + doubt_limits(size, record["limits"])


def _describe(model: TwoTower) -> dict[str, object]:
    context = [*model.context_tower.parameters(), model.context_lm_head.weight]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "context_parameters": sum(p.numel() for p in context),
        "hidden_size": model.config.hidden_size,
        "pattern": model.config.context.pattern,
        "vocab_size": model.config.vocab_size,
        "block_size": model.config.block_size,
    }


@dataclass(frozen=True)
class CpuLoad:
    """Seconds up to now: of the clock, this process, and all processes (None: it is not told)."""

    wall_s: float
    own_s: float
    busy_s: float | None


def take_load() -> CpuLoad:
    """The load so far; Linux counts it, with what a virtual machine's host took away."""
    text = _STAT.read_text() if _STAT.is_file() else ""
    return CpuLoad(time.perf_counter(), time.process_time(), parse_stat(text))


def parse_stat(text: str) -> float | None:
    """Busy seconds of all cores, from the `cpu` line of /proc/stat, which has ticks by kind."""
    line = next((line for line in text.splitlines() if line.startswith("cpu ")), None)
    if line is None:
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others_used(before: CpuLoad, after: CpuLoad, during: str) -> list[str]:
    """A line if other processes kept cores busy between two loads: the timings are doubtful."""
    if before.busy_s is None or after.busy_s is None or after.wall_s <= before.wall_s:
        return []
    busy = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    cores = busy / (after.wall_s - before.wall_s)
    if cores <= _MAX_OTHERS:
        return []
    return [
        f"{during}: other processes used {cores:.2f} cores; timings of several threads suffer "
        "most, measure again on an idle machine"
    ]


def watch_idle() -> list[str]:
    """What others do while we do nothing: the machine's state before we measure."""
    before = take_load()
    time.sleep(_IDLE_S)
    return others_used(before, take_load(), "before the benchmark")
