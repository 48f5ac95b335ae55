"""What a denoiser reads of an answer: kept from the passes that wrote it, or read once more."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_adapt import backbone, unordered
from tiny_models import prompts_of
from twotower import TwoTower
from twotower.adapt import run as stages
from twotower.adapt.answers import Answer, Question, read_answers, write_answers
from twotower.adapt.budget import Budget
from twotower.adapt.features import Columns, attended, columns_of, read_columns, write_part
from twotower.adapt.options import AnswerOptions, ThinOptions, WorkFolder
from twotower.adapt.run import collect_answers
from twotower.backends import accelerate

READS = [2, 3, 6]


def questions(count: int) -> list[Question]:
    """Prompts of unequal lengths, so that rows of a batch are padded, move up and grow."""
    prompts = prompts_of([1 + 7 * i % 23 for i in range(count)])
    return [Question(number=i, prompt=prompt, task="t") for i, prompt in enumerate(prompts)]


def fast(name: str) -> TwoTower:
    """A backbone as adapt has it: with passes of a backend, and of rounded weights."""
    backend, _, quantization = name.partition(" ")
    made = unordered() if backend == "mamba" else backbone()
    backend = "native" if backend == "mamba" else backend
    made.generation_defaults = {"eos_token_id": (*range(10, 20),)}  # answers of unequal lengths
    return accelerate(made, backend, quantization or "none")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["eager", "native", "native int8", "native int4", "mamba"])
def test_what_is_kept_is_what_would_be_read(name: str, tmp_path: Path) -> None:
    """Guards acceptance: features of another row, or shifted by one token, train a denoiser that
    drafts nothing, and its loss falls all the same.
    """
    model = fast(name)
    keyed = attended(model.config.context, READS)
    options, file = AnswerOptions(max_new_tokens=9, batch_size=5), tmp_path / "answers.jsonl"
    found = list[tuple[Answer, Columns]]()
    for answer, context in write_answers(model, questions(14), file, options, 60.0):
        assert context is not None
        found.append((answer, columns_of(context, keyed)))
    assert len(found) == 14
    for answer, kept in found:
        text = answer.prompt + answer.tokens
        read = read_columns(model, text, keyed)
        assert {*kept} == {*read} == {"hidden", *(f"{kind}.{i}" for kind in "kv" for i in keyed)}
        for column, own in kept.items():
            assert len(own) == len(text) - 1
            torch.testing.assert_close(own, read[column], rtol=0.02, atol=0.02)  # in bfloat16


def test_answers_are_read_again_only_where_they_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the time of the stage, a quarter of which the second reading took; and a run that was
    killed, whose answers no pass remembers.
    """
    model, work, shape = backbone(), WorkFolder(tmp_path / "work"), ThinOptions(layers=2)
    options, read = AnswerOptions(max_new_tokens=5, batch_size=7), list[list[int]]()

    def counted(*given: object) -> Columns:
        read.append([*given[1]])  # type: ignore[misc]
        return read_columns(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("twotower.adapt.features.read_columns", counted)
    monkeypatch.setattr(stages, "PART", 8)
    work.path.mkdir()
    killed = write_answers(model, questions(30), work.answers, options, 60.0)
    left = [next(killed).answer for _ in range(11)]
    killed.close()
    list(collect_answers(model, questions(30), work, shape, options, Budget(minutes=9)))
    assert read == [answer.prompt + answer.tokens for answer in left]
    written = {f.name: load_file(f) for f in sorted(work.features.glob("part-*"))}
    answers = read_answers(work.answers)
    assert [len(part["lengths"]) for part in written.values()] == [8, 8, 8, 6]
    for number, (name, part) in enumerate(written.items()):
        write_part(model, answers[8 * number :][:8], [2, 6], tmp_path / name)
        again = load_file(tmp_path / name)
        assert {*part} == {*again}
        for column, own in part.items():
            torch.testing.assert_close(own, again[column], rtol=0.02, atol=0.02)
