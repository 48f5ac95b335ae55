"""Questions as people have them: records of several forms, and files that hold none."""

import json
from pathlib import Path

import pytest

from twotower.cli.questions import read_questions

SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "a?"}, "a?"),
        ({"prompt": [3, 4]}, [3, 4]),
        ({"turns": ["a?", "b?"]}, "a?"),
        ({"messages": [SYSTEM, {"role": "user", "content": "a?"}, ANSWER]}, "a?"),
        (
            {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
            "a?",
        ),
        ({"instruction": "Add them.", "input": "3, 4", "output": "7"}, "Add them.\n\n3, 4"),
        ({"instruction": "Add 3 and 4.", "input": "", "output": "7"}, "Add 3 and 4."),
        ({"question": "a?", "input": "b"}, "a?"),
    ],
)
def test_a_record_says_what_the_user_asked(record: object, asked: object, tmp_path: Path) -> None:
    """Silent failure: an instruction without its data, or the answer, is learnt from."""
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    assert [question.text for question in read_questions([tmp_path / "q.jsonl"])] == [asked]


@pytest.mark.parametrize("messages", [[], [SYSTEM, ANSWER], [{"role": "user", "content": None}]])
def test_messages_without_a_users_are_one_line(messages: object, tmp_path: Path) -> None:
    """Guards against a prompt of something else."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    if messages:
        with pytest.raises(
            ValueError, match=r"line 1 has none of prompt, .* that is text or token"
        ):
            read_questions([tmp_path / "q.jsonl"])
    else:
        assert read_questions([tmp_path / "q.jsonl"])[0].text == []  # blank, and left out later


@pytest.mark.parametrize("name", ["q.json", "q.csv", "q.TSV", "q.parquet"])
def test_a_table_is_no_list_of_prompts(name: str, tmp_path: Path) -> None:
    """Silent failure: hours of training on answers to lines of JSON and commas."""
    (tmp_path / name).write_text('prompt,answer\n"What is 3?",3\n' * 40)
    with pytest.raises(ValueError, match=r"^prompts: .* one prompt a line; write it as \.jsonl"):
        read_questions([tmp_path / name])
