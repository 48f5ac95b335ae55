"""One size's race from its entrants to its record."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from twotower.engine import GenerateOptions, stream
from twotower.lab.corpus import CATEGORIES, Document
from twotower.lab.evaluate.run import draw_groups
from twotower.lab.evaluate.suite import Judge
from twotower.lab.race.contest import Contestant, Heat, Lap, RivalContestant, race
from twotower.lab.race.interference import disturbances, take_snapshot
from twotower.lab.race.limits import Machine
from twotower.lab.race.options import NUM_ITEMS, SHIPPED, RaceOptions
from twotower.lab.race.ours import ENGINES, OurContestant
from twotower.lab.race.passes import PassShape, time_passes
from twotower.lab.race.regimes import describe_limits, doubt_limits
from twotower.lab.race.results import (
    Decode,
    count_right,
    count_same,
    summarise_laps,
    summarise_passes,
)
from twotower.lab.race.script import record_script
from twotower.lab.race.sizes import open_rivals, random_config, random_model
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

REPLAY_PROMPT = 256  # most tokens of a prompt before a replay: reading it is not what is replayed
Advance = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A size with what races on it: our engines' models by name, and the prompts."""

    size: str
    model: TwoTower
    engines: Mapping[str, TwoTower]
    contestants: Sequence[Contestant]
    heats: Sequence[Heat]
    missing: Sequence[str]


def draw_heats(tokenizer: Tokenizer, options: RaceOptions, judge: Judge) -> tuple[list[Heat], int]:
    """Held-out prompts of every category in turns, and how many were too long."""
    groups = draw_groups(CATEGORIES, options.items or NUM_ITEMS, options.seed, 1)
    heats = [
        Heat(
            ids=tokenizer.encode_prompt(document.prompt),
            max_new_tokens=options.max_new_tokens,
            is_right=partial(_is_right, judge, document),
        )
        for group in groups
        for document in group
    ]
    kept = [heat for heat in heats if len(heat.ids) <= options.max_prompt_tokens]
    if not kept:
        raise ValueError(
            f"max_prompt_tokens: {options.max_prompt_tokens} leaves out every prompt; use more"
        )
    return kept, len(heats) - len(kept)


def _is_right(judge: Judge, document: Document, text: str) -> bool:
    return judge(document, text).correct


def mode_options(options: RaceOptions) -> list[GenerateOptions]:
    """Each mode's options; all else is the checkpoint's."""
    return [
        # GenerateOptions checks the mode itself.
        GenerateOptions(mode=mode, max_new_tokens=options.max_new_tokens)  # type: ignore[arg-type]
        for mode in options.mode_names
    ]


def record_replays(
    model: TwoTower, heats: Sequence[Heat], modes: Sequence[GenerateOptions], seed: int
) -> list[Heat]:
    """Heats with each mode's script on this model, behind random prompts as long as the real ones.

    Prompts are cut to 256 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    low = model.config.mask_token_id + 1
    replays = []
    for heat in heats:
        length = min(len(heat.ids), REPLAY_PROMPT)
        ids = torch.randint(low, model.config.vocab_size, (length,), generator=generator)
        scripts = {str(o.mode): record_script(stream(model, [heat.ids], o)) for o in modes}
        replays.append(Heat(ids=ids.tolist(), max_new_tokens=heat.max_new_tokens, scripts=scripts))
    return replays


@contextmanager
def enter(
    size: str, model: TwoTower, heats: Sequence[Heat], options: RaceOptions
) -> Iterator[Entry]:
    """A size's entrants, ready to start; rivals are closed at the end."""
    engines, unable = open_engines(model, options.engine_names)
    modes = mode_options(options)
    ours = [OurContestant(n, m, mode) for n, m in engines.items() for mode in modes]
    threads, dtype = torch.get_num_threads(), model.context_lm_head.weight.dtype
    with open_rivals(model if options.rivals else None, threads, dtype) as (rivals, missing):
        yield Entry(
            size=size,
            model=model,
            engines=engines,
            contestants=[*ours, *map(RivalContestant, rivals)],
            heats=heats,
            missing=[*unable, *missing],
        )


def open_engines(model: TwoTower, names: Sequence[str]) -> tuple[dict[str, TwoTower], list[str]]:
    """The model on each engine, and a line for each that cannot run it; ValueError if none can."""
    engines: dict[str, TwoTower] = {}
    unable: list[str] = []
    for name in names:
        try:
            engines[name] = ENGINES[name](model)
        except (ValueError, ImportError) as error:
            unable.append(f"{name}: {error}")
    if not engines:
        raise ValueError(f"engines: none can run this model ({'; '.join(unable)}); use pytorch")
    return engines, unable


def make_random(size: str, shipped: TwoTower, seed: int) -> TwoTower:
    """The random model of a size, with the shipped model's block, dtype and decoding defaults."""
    config = random_config(size, shipped.config.block_size)
    model = random_model(config, seed, shipped.context_lm_head.weight.dtype)
    model.generation_defaults = shipped.generation_defaults
    return model


def run_entry(
    entry: Entry, options: RaceOptions, decode: Decode, machine: Machine, advance: Advance
) -> tuple[dict[str, object], list[str]]:
    """Race, time the passes, set both against the limits: a size's record and its warnings."""
    before = take_snapshot()
    laps: list[list[Lap]] = []
    for row in race(entry.contestants, entry.heats):
        laps.append(row)
        advance(entry.size)
    shape = PassShape(
        num_past=round(statistics.median(len(heat.ids) for heat in entry.heats)),
        block_size=entry.model.config.block_size,
        repeats=options.repeats,
        seed=options.seed,
    )
    times = time_passes(entry.engines, shape)
    warnings = disturbances(before, take_snapshot(), entry.size)
    record = summarise_laps(entry.contestants, entry.heats, laps, list(entry.engines))
    best_ar_ms = record["best_ar_decode_ms"]
    assert isinstance(best_ar_ms, float)
    record |= summarise_passes(times, best_ar_ms, shape.block_size)
    record["limits"] = limits = describe_limits(entry.model, record, shape, machine)
    warnings += doubt_limits(entry.size, limits)
    if entry.size == SHIPPED:
        _add_quality(
            record,
            count_right(entry.contestants, entry.heats, laps, decode),
            count_same(entry.contestants, laps, list(entry.engines)),
        )
    record |= {
        "model": _describe(entry.model),
        "num_past": shape.num_past,
        "is_replay": entry.size != SHIPPED,
        "missing": list(entry.missing),
    }
    return record, warnings


def _add_quality(
    record: Mapping[str, object],
    right: Mapping[tuple[str, str], int],
    same: Mapping[tuple[str, str], int],
) -> None:
    engines = record["engines"]
    assert isinstance(engines, dict)
    for (engine, mode), count in right.items():
        found = engines[engine][mode]
        found |= {
            "correct": count,
            "accuracy": count / found["n"],
            "same_tokens_as_own_ar": same[engine, mode],
        }


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
