"""Conversations into token ids."""

import json
import resource
import time
from pathlib import Path

import pytest

from tiny_text import tiny_tokenizer
from twotower.serve.chat import (
    ChatTemplate,
    Manner,
    encode_chat,
    encode_pieces,
    plain_template,
    read_template,
)
from twotower.serve.errors import ApiError
from twotower.serve.schema import ChatRequest
from twotower.serve.tool_calls import BARE, HERMES
from twotower.tokenizer import Tokenizer, train_tokenizer

TURNS = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
TOKENIZER = train_tokenizer(["abc <|user|> <eos> def"] * 5, vocab_size=300)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source=source, special={"bos_token": "<bos>"})


def user(content: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


def test_the_templates_special_tokens_are_tokens() -> None:
    ids = template(TURNS).encode(user(" abc "), None, TOKENIZER, 1000)
    assert ids == [TOKENIZER.bos_id, *TOKENIZER.encode("<|user|>abc")]


@pytest.mark.parametrize("text", ["<eos>", "a<bos><eos>b", "<mask>", "<eo<eos>s>"])
def test_a_callers_special_tokens_stay_letters(text: str) -> None:
    """Guards against a user who ends their turn and speaks as the system."""
    ids = template(TURNS).encode(user(text), None, TOKENIZER, 1000)
    assert TOKENIZER.eos_id not in ids and TOKENIZER.mask_id not in ids
    assert ids.count(TOKENIZER.bos_id) == 1 and ids[0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(ids) == f"<|user|>{text}"


THINKS = "{{ messages[0].content }}{% if enable_thinking is true %} think{% endif %}"


def test_a_request_s_variables_count_more_than_the_server_s() -> None:
    """Silent failure: Qwen3 thinks aloud though the client or the server has switched it off."""
    served = ChatTemplate(source=THINKS, special={}, variables={"enable_thinking": True})
    for given, expected in (({}, "a think"), ({"enable_thinking": False}, "a")):
        ids = served.encode(user("a"), None, TOKENIZER, 1000, manner=Manner(variables=given))
        assert TOKENIZER.decode(ids) == expected
    ids = template(THINKS).encode(user("a"), None, TOKENIZER, 1000)
    assert TOKENIZER.decode(ids) == "a"


@pytest.mark.parametrize("content", ["Sure: ", " Sure:", "Sure <eos>: it", "{{ x }}"])
@pytest.mark.parametrize("way", ["", " | trim"])
def test_a_reply_that_is_begun_is_continued_as_in_transformers(content: str, way: str) -> None:
    """Silent failure: the model answers its own half of a reply, or goes on behind its end."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content WAY }}<eos>{% endfor %}[end]"
    source = source.replace(" WAY", way)
    turns = [*user("Sure: "), {"role": "assistant", "content": content}]
    ((theirs,), _) = utils.render_jinja_template(
        [turns], chat_template=source, continue_final_message=True
    )
    begun = Manner(continues_last=True)
    ids = template(source).encode(turns, None, TOKENIZER, 1000, manner=begun)
    assert TOKENIZER.decode(ids, skip_special=False) == theirs
    assert ids.count(TOKENIZER.eos_id) == 1  # the first turn's: what a caller wrote stays letters
    with pytest.raises(ApiError, match="does not show the last message"):
        template("{{ messages[0].content }}").encode(turns, None, TOKENIZER, 1000, manner=begun)
    with pytest.raises(ApiError, match="too long"):
        template(source).encode(turns, None, TOKENIZER, 3, manner=begun)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: tools is each prompt's"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "bos_token is each prompt's own; leave"),
        ({"continue_final_message": True}, "the last message must be the assistant's"),
        ({"add_generation_prompt": False}, "must be true without continue_final_message"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "must be false with continue_final_message",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, object], reason: str) -> None:
    body = ChatRequest.model_validate({"messages": user("a"), **fields})
    with pytest.raises(ApiError, match=reason):
        encode_chat(body, "m", template(TURNS), TOKENIZER, 1000)


def test_calls_are_not_continued() -> None:
    """Silent failure: the calls of a reply that is to be continued are left out of it."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = {"role": "assistant", "content": "So", "tool_calls": [call]}
    fields = {"messages": [*user("a"), last], "continue_final_message": True}
    with pytest.raises(ApiError, match="must be the assistant's, without calls"):
        encode_chat(ChatRequest.model_validate(fields), "m", template(TURNS), TOKENIZER, 1000)


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
        template(source).encode(user("a"), None, TOKENIZER, 1000)
    assert refused.value.status == 400 and refused.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% set n = 1 %}{% generation %}{% set n = 2 %}a{{ n }}{% endgeneration %}b{{ n }}",
            "a2b1",
        ),
        ("{%- for m in [1, 2] %}{%- generation -%} {{ m }}. {% endgeneration %}{% endfor %}", None),
        ("{{ {'b': '<', 'a': 1} | tojson(separators=(',', ':'), sort_keys=True) }}", None),
        ("{{ ['\u00e9'] | tojson(True) }}{{ [1] | tojson(indent=4) }}", None),
    ],
)
def test_what_transformers_offers_a_template_is_here(source: str, expected: str | None) -> None:
    """Silent failure: SmolLM3's template, which marks its own turns, is refused in every chat."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    ((theirs,), _) = utils.render_jinja_template([user("x")], chat_template=source)
    assert theirs == (expected or theirs) and len(theirs) > 3
    ids = template(source).encode(user("x"), None, TOKENIZER, 1000)
    assert TOKENIZER.decode(ids) == theirs


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
    ids = plain.encode(turns, None, TOKENIZER, 1000)
    assert ids[0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(ids) == "Be short.\nQ: One\nA: Two\nQ: Three\nA:"
    turns = [
        {"role": "user", "content": "Two pies"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    assert TOKENIZER.decode(plain.encode(turns, tools, TOKENIZER, 1000)) == (
        "Tools:\norder(dish: string, count: integer)\nstop()\nUser: Two pies\n"
        'Call: {"name": "order", "arguments": {"dish": "pie", "count": 2}}\nResult: done\nCall:'
    )


def test_how_calls_are_written_shows_in_the_template() -> None:
    assert template("{{ tools }} <tool_call>").tool_style == HERMES
    assert template("{{ tools }}").tool_style == BARE
    assert template("{{ tools }}").has_tools and not template(TURNS).has_tools
    assert template(TURNS).tool_style == HERMES  # it is told so


def test_a_template_that_knows_no_tools_is_told_of_them() -> None:
    """Guards ChatML without tools, as SmolLM2's: tools were refused, and calls and results of the
    conversation so far were left out, or put into a role that the model never saw."""
    call = {"name": "add", "arguments": '{"a": 1}'}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    for given in ({"tools": tools}, {}):
        body = ChatRequest(model="m", messages=messages, **given)  # type: ignore[arg-type]
        text = TOKENIZER.decode(encode_chat(body, "m", template(TURNS), TOKENIZER, 5000))
        assert text.startswith("<|system|>Be brief.")
        assert ('{"name": "add", "parameters": {"type": "object"}}' in text) == bool(given)
        called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        answered = "<tool_response>\n7\n</tool_response>"
        assert text.endswith(f"<|user|>Add.<|assistant|>{called}<|user|>{answered}")
    del messages[0]
    body = ChatRequest(model="m", messages=messages, tools=tools)  # type: ignore[arg-type]
    ids = encode_chat(body, "m", template(TURNS), TOKENIZER, 5000)
    assert TOKENIZER.decode(ids).startswith("<|system|>You can call functions.")


def test_a_tokenizer_without_bos_has_none() -> None:
    assert plain_template(tiny_tokenizer()).special["bos_token"] in ("", "<bos>")


BOMBS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "a long string": "{{ messages[0].content * 10**10 }}",
    "a constant that is computed when compiled": "{{ 'a' * 10**10 }}",
    "a number": "{{ 9 ** (9 ** 9) }}",
    "a list": "{{ [0] * 10**9 }}",
    "doubling": "{% set n = namespace(t='aa') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}"
    "{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "depth": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "many blocks": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "a slow filter": "{% for i in range(99999) %}{{ (messages[0].content * 9999) | wordwrap(3) }}"
    "{% endfor %}",
    "an endless text": "{% for i in range(99999) %}{{ messages[0].content * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_is_a_refusal(name: str) -> None:
    """Guards the server against a checkpoint's template: the sandbox bounds what it may touch, not
    what it may take, and nested ranges are each below its bound.
    """
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ApiError, match="the model's chat template") as refused:
        template(BOMBS[name]).encode(user("a"), None, TOKENIZER, 1000)
    assert refused.value.status == 400 and len(refused.value.message) < 600
    assert time.monotonic() - start < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB, of ours"
    assert template(TURNS).encode(user("a"), None, TOKENIZER, 1000)


def test_too_long_a_text_is_refused_without_being_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the time of a thread: a megabyte of text takes seconds to encode."""
    encoded: list[int] = []
    whole = Tokenizer.encode

    def encode(self: Tokenizer, text: str, **given: bool) -> list[int]:
        encoded.append(len(text))
        return whole(self, text, **given)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    for content in ("abc def " * 100_000, "<eos>" * 100_000):
        with pytest.raises(ApiError, match="at most 100 tokens") as refused:
            template(TURNS).encode(user(content), None, TOKENIZER, 100)
        assert refused.value.code == "context_length_exceeded"
    assert sum(encoded) < 10_000


def test_a_text_of_long_tokens_is_no_long_text() -> None:
    """Guards text that is shorter in tokens than its letters say."""
    found = TOKENIZER.encode("abc <|user|> <eos> def" * 3)
    text = TOKENIZER.decode(found)
    for most in (len(found), len(found) + 5):
        assert encode_pieces(TOKENIZER, [(text, False)], most) == found
    with pytest.raises(ApiError):
        encode_pieces(TOKENIZER, [(text, False)], len(found) - 1)
    blanks = "=" * 64
    other = train_tokenizer([blanks * 20], vocab_size=300)
    assert len(other.encode(blanks * 4)) <= 16
    assert encode_pieces(other, [(blanks * 4, False)], 16) == other.encode(blanks * 4)


def test_files_of_templates_are_bounded(tmp_path: Path) -> None:
    file, config = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    file.write_text("a" * (1 << 20) + "b")
    with pytest.raises(ValueError, match="more than 1048576 characters"):
        read_template(tmp_path)
    file.unlink()
    config.write_text(json.dumps({"chat_template": "a" * (1 << 20) + "b"}))
    with pytest.raises(ValueError, match="more than 1048576 characters"):
        read_template(tmp_path)
    for damaged in ("[" * 100_000, json.dumps(["a"])):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer_config.json (is nested|holds no JSON)"):
            read_template(tmp_path)
    config.write_text(json.dumps({"chat_template": ["a", {"name": "default"}]}))
    assert read_template(tmp_path) is None


def test_memory_of_a_template_is_bounded() -> None:
    with pytest.raises(ApiError, match="MemoryError"):
        template("{{ messages[0].content * 600000000 }}").encode(user("a"), None, TOKENIZER, 1000)
