"""`twotower bench` on a real model: prompts from files in its chat template, and the record."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from twotower.cli.machine import recorded
from twotower.cli.measuring import describe_versions
from twotower.cli.questions import question_encoder, read_questions, tell_left_out
from twotower.lab.bench.contest import contest_table, contestants, run_contest, summarise
from twotower.lab.bench.run import MeasureOptions, watch_idle
from twotower.lab.corpus import CATEGORIES
from twotower.lab.evaluate.run import draw_groups
from twotower.lab.report import Record, Table
from twotower.loading import Loaded


def measure(
    options: MeasureOptions, loaded: Loaded, file: Path, denoiser: str | None
) -> dict[str, Any]:
    """The record of a contest; file and denoiser: what other processes load."""
    prompts = encode_questions(loaded, options)
    threads = torch.get_num_threads()
    compared = options.pairs(is_contest=True)
    with TemporaryDirectory(prefix="twotower-contest-") as folder:
        who, missing = contestants(loaded.model, file, compared, threads, Path(folder), denoiser)
        warnings = watch_idle()
        answers, more = run_contest(who, prompts, options.max_new_tokens)
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


def contest_tables(record: Record) -> list[Table]:
    """What a token costs each."""
    title = f"{record['model']}: {record['prompts']} prompts, {record['threads']} threads"
    return [contest_table(record["contestants"], title)]


def encode_questions(loaded: Loaded, options: MeasureOptions) -> list[list[int]]:
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
