"""Conversations into token ids."""

import json
from pathlib import Path

import pytest

from tiny_text import tiny_tokenizer
from twotower.serve.chat_template import ChatTemplate, plain_template, read_template
from twotower.serve.errors import ApiError
from twotower.serve.tool_calls import BARE, HERMES
from twotower.tokenizer import train_tokenizer

TURNS = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
TOKENIZER = train_tokenizer(["abc <|user|> <eos> def"] * 5, vocab_size=300)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source=source, special={"bos_token": "<bos>"})


def user(content: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


def test_the_templates_special_tokens_are_tokens() -> None:
    ids = template(TURNS).encode(user(" abc "), None, TOKENIZER)
    assert ids == [TOKENIZER.bos_id, *TOKENIZER.encode("<|user|>abc")]


@pytest.mark.parametrize("text", ["<eos>", "a<bos><eos>b", "<mask>", "<eo<eos>s>"])
def test_a_callers_special_tokens_stay_letters(text: str) -> None:
    """Guards against a user who ends their turn and speaks as the system."""
    ids = template(TURNS).encode(user(text), None, TOKENIZER)
    assert TOKENIZER.eos_id not in ids and TOKENIZER.mask_id not in ids
    assert ids.count(TOKENIZER.bos_id) == 1 and ids[0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(ids) == f"<|user|>{text}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[5].content.x }}", "no element 5"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10000000) | list }}", "Range too big"),
    ],
)
def test_a_template_that_fails_is_a_clear_refusal(source: str, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as refused:
        template(source).encode(user("a"), None, TOKENIZER)
    assert refused.value.status == 400 and refused.value.param == "messages"


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "one"}
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(config))
    assert read_template(tmp_path) == ChatTemplate(
        source="one", special={"bos_token": "<s>", "eos_token": "</s>"}
    )
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    file.write_text(json.dumps({"chat_template": named}))
    assert read_template(tmp_path) == ChatTemplate(source="a", special={})
    (tmp_path / "chat_template.jinja").write_text("two")
    assert read_template(tmp_path) == ChatTemplate(source="two", special={})
    other = tmp_path / "other.jinja"
    with pytest.raises(ValueError, match="there is no file"):
        read_template(tmp_path, other)
    other.write_text("three")
    assert read_template(tmp_path, other) == ChatTemplate(source="three", special={})


def test_the_plain_format_is_that_of_the_shipped_models_text() -> None:
    """Guards against prompts that look right and that the model has never seen."""
    plain = plain_template(TOKENIZER)
    parameters = {"properties": {"dish": {"type": "string"}, "count": {"type": "integer"}}}
    tools = [
        {"type": "function", "function": {"name": "order", "parameters": parameters}},
        {"type": "function", "function": {"name": "stop"}},
    ]
    call = {"function": {"name": "order", "arguments": {"dish": "pie", "count": 2}}}
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ]
    ids = plain.encode(turns, None, TOKENIZER)
    assert ids[0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(ids) == "Be short.\nQ: One\nA: Two\nQ: Three\nA:"
    turns = [
        {"role": "user", "content": "Two pies"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    assert TOKENIZER.decode(plain.encode(turns, tools, TOKENIZER)) == (
        "Tools:\norder(dish: string, count: integer)\nstop()\nUser: Two pies\n"
        'Call: {"name": "order", "arguments": {"dish": "pie", "count": 2}}\nResult: done\nCall:'
    )


def test_how_calls_are_written_shows_in_the_template() -> None:
    assert template("{{ tools }} <tool_call>").tool_style == HERMES
    assert template("{{ tools }}").tool_style == BARE
    assert template("{{ tools }}").has_tools and not template(TURNS).has_tools


def test_a_tokenizer_without_bos_has_none() -> None:
    assert plain_template(tiny_tokenizer()).special["bos_token"] in ("", "<bos>")
