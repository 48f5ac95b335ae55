"""`twotower bench` on a real model: prompts from files in its chat template, and the record."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from twotower.cli.machine import recorded
from twotower.cli.measuring import describe_versions
from twotower.cli.serve import need_extra
from twotower.lab.corpus import CATEGORIES
from twotower.lab.evaluate.run import draw_groups, split_names
from twotower.lab.race.contest import contest_table, contestants, run_contest, summarise
from twotower.lab.race.run import RaceOptions, watch_idle
from twotower.lab.report import Record, Table
from twotower.loading import Loaded

RECORD_FILE = "contest.json"
_FIELDS = ("prompt", "question", "instruction", "turns")


def measure(options: RaceOptions, loaded: Loaded, file: Path) -> dict[str, Any]:
    """The record of a contest; file: what other processes load."""
    prompts = encode_questions(loaded, list(_texts(options)), options.max_prompt_tokens)
    threads = torch.get_num_threads()
    with TemporaryDirectory(prefix="twotower-contest-") as folder:
        who, missing = contestants(
            loaded.model, file, split_names(options.bits), threads, Path(folder)
        )
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


def _texts(options: RaceOptions) -> Iterator[str]:
    """Questions of the files, or of the suite."""
    if not options.prompts:
        groups = draw_groups(CATEGORIES, options.items, options.seed, 1)
        yield from (document.prompt for group in groups for document in group)
    for file in options.prompts:
        yield from _questions(file, options.items)


def _questions(file: Path, most: int) -> Iterator[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: cannot read {file} ({error})") from None
    for number, line in enumerate(lines[:most], 1):
        try:
            values = json.loads(line)
            found = next(values[name] for name in _FIELDS if name in values)
        except (ValueError, TypeError, StopIteration):
            raise ValueError(
                f"prompts: {file} line {number} must be an object with one of {', '.join(_FIELDS)}"
            ) from None
        yield found[0] if isinstance(found, list) else found


def encode_questions(loaded: Loaded, texts: Sequence[str], most: int) -> list[list[int]]:
    """Token ids: as a user's message where the model has a chat template."""
    with need_extra("bench on a real model"):
        from twotower.serve.chat import read_template
    tokenizer = loaded.need_tokenizer()
    template = read_template(loaded.folder, None)
    if template is None:
        found = [tokenizer.encode_prompt(text) for text in texts]
    else:
        messages = [[{"role": "user", "content": text}] for text in texts]
        found = [template.encode(own, None, tokenizer, 1 << 20) for own in messages]
    kept = [ids for ids in found if len(ids) <= most]
    if not kept:
        raise ValueError(f"max_prompt_tokens: {most} leaves out every prompt; use more")
    return kept
