"""Tool calls: which texts each choice and style lets a model write, and how they are read."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_grammar import accepts
from twotower.serve.tool_calls import (
    BARE,
    HERMES,
    CallReader,
    ToolCall,
    Tools,
    ToolStyle,
    ToolText,
    read_tool_calls,
    tool_call,
)

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 9}},
}
TOOLS: Tools = [
    {"type": "function", "function": {"name": "get", "parameters": CITY}},
    {"type": "function", "function": {"name": 'st"op'}},
]
GET = '{"name": "get", "arguments": {"city": "Oslo"}}'
STOP = '{"name": "st\\"op", "arguments": {}}'
WRONG = '{"name": "get", "arguments": {"city": 5}}'
OTHER = '{"name": "put", "arguments": {"city": "Oslo"}}'
NAMED = {"type": "function", "function": {"name": "get"}}


def tagged(*calls: str, between: str = "\n") -> str:
    return between.join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def is_whole(text: str, choice: object, style: ToolStyle = BARE, is_parallel: bool = True) -> bool:
    """Whether a text may be written and end there."""
    grammar = tool_call(TOOLS, choice, style, is_parallel)  # type: ignore[arg-type]
    return accepts(grammar, text)


@pytest.mark.parametrize(
    ("text", "required", "auto", "named"),
    [
        (GET, True, True, True),
        (f" {GET}", True, True, True),
        (STOP, True, True, False),
        (WRONG, False, False, False),
        (OTHER, False, False, False),
        (GET[:-1], False, False, False),
        (f"{GET} x", False, False, False),
        (f"{GET}{GET}", False, False, False),
        ("", False, True, False),
        (" ", False, True, False),
        ("no call\n{", False, True, False),
        (" no", False, True, False),
        ("  {", False, True, False),
        ("{}", False, False, False),
        (" {", False, False, False),
    ],
)
def test_bare_calls(text: str, required: bool, auto: bool, named: bool) -> None:
    """Guards against half calls and unknown tools, and text that auto must leave alone."""
    found = [is_whole(text, choice) for choice in ("required", "auto", NAMED)]
    assert found == [required, auto, named]


@pytest.mark.parametrize(
    ("text", "required", "auto", "single"),
    [
        (tagged(GET), True, True, True),
        (tagged(GET, STOP), True, True, False),
        (tagged(GET, STOP, between=""), True, True, False),
        (f"I look. {tagged(GET)}", False, True, True),
        (f"{tagged(GET)} and {tagged(STOP)} done", False, True, False),
        (f"{tagged(GET)} done", False, True, False),  # one call is the end
        (tagged(WRONG), False, False, False),
        (tagged(GET)[:-2], False, False, False),
        ("<tool_call>", False, True, True),  # the tag is not whole without its line break
        ("<tool_call>\n", False, False, False),
        ("no call", False, True, True),
        ("", False, True, True),
        (GET, False, True, True),
    ],
)
def test_tagged_calls(text: str, required: bool, auto: bool, single: bool) -> None:
    found = [is_whole(text, choice, HERMES) for choice in ("required", "auto")]
    assert found == [required, auto]
    assert is_whole(text, "auto", HERMES, is_parallel=False) == single


def test_one_required_call_when_not_parallel() -> None:
    assert is_whole(tagged(GET), "required", HERMES, is_parallel=False)
    assert not is_whole(tagged(GET, GET), "required", HERMES, is_parallel=False)


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ([TOOLS[0], TOOLS[0]], "auto", "same name"),
        (
            [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}],
            "auto",
            "tools[0].function.parameters must be a schema of type object",
        ),
        (TOOLS, {"type": "function", "function": {"name": "put"}}, 'one of: get, st"op'),
    ],
)
def test_unusable_tools(tools: Tools, choice: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        tool_call(tools, choice)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        (f" {GET}", BARE, ToolText("", (ToolCall("get", '{"city": "Oslo"}'),))),
        (STOP, BARE, ToolText("", (ToolCall('st"op', "{}"),))),
        (f"{GET} x", BARE, ToolText(f"{GET} x", ())),
        ("no call", BARE, ToolText("no call", ())),
        ('{"name": "get"}', BARE, ToolText('{"name": "get"}', ())),
        ('{"name": 1, "arguments": {}}', BARE, ToolText('{"name": 1, "arguments": {}}', ())),
        (GET[:-1], BARE, ToolText(GET[:-1], ())),
        (
            f"I look.\n{tagged(GET, STOP)} Done.",
            HERMES,
            ToolText(
                "I look.\n\n Done.",
                (ToolCall("get", '{"city": "Oslo"}'), ToolCall('st"op', "{}")),
            ),
        ),
        (tagged(GET)[:-3], HERMES, ToolText("", (ToolCall("get", '{"city": "Oslo"}'),))),
        (tagged(GET)[:40], HERMES, ToolText(tagged(GET)[:40], ())),
        (tagged("x"), HERMES, ToolText(tagged("x"), ())),
    ],
)
def test_reading(text: str, style: ToolStyle, expected: ToolText) -> None:
    assert read_tool_calls(text, style) == expected


@pytest.mark.parametrize("style", [BARE, HERMES])
def test_a_call_that_is_cut_is_a_call_or_nothing(style: ToolStyle) -> None:
    """Guards a client from half a call as text, wherever `max_tokens` ends it."""
    before = "I look.\n" if style.begin else ""
    whole = f"{before}{style.begin}{STOP}{style.end}"
    opening = '{"name": "st\\"op", "arguments":'
    for length in range(len(before) + len(style.begin) + 1, len(whole) + 1):
        found = read_tool_calls(whole[:length], style, is_cut=True)
        written = whole[len(before) + len(style.begin) : length].partition(style.end[:1] or "-")[0]
        assert found.content.strip() == before.strip()
        if len(written) < len(opening):
            assert (found.calls, found.is_cut) == ((), True)
        else:
            ((name, arguments),) = [(one.name, one.arguments) for one in found.calls]
            assert name == 'st"op' and "{}".startswith(arguments)
            assert found.is_cut == (len(written) < len(STOP))


def test_text_flows_as_soon_as_it_is_no_call() -> None:
    """Guards a stream that waits for its end because a call might come."""
    reader = CallReader(HERMES)
    found = [reader.push(one).content for one in "a <t b\nc"]
    assert found == ["a", "", "", "", " <t", " b", "", "\nc"]
    reader = CallReader(BARE)
    assert [reader.push(one).content for one in " no {"] == ["", " n", "o", " ", "{"]


@settings(max_examples=200)
@given(
    parts=st.lists(st.sampled_from(["a", " ", "\n", "<", "<tool_call>", tagged(GET), "{", "x"])),
    cuts=st.lists(st.integers(0, 60)),
    style=st.sampled_from([BARE, HERMES]),
    is_cut=st.booleans(),
)
def test_pieces_give_what_the_whole_gives(
    parts: list[str], cuts: list[int], style: ToolStyle, is_cut: bool
) -> None:
    """Guards the border between chunks: a mark or white space that lies across it."""
    text = "".join(parts)
    places = sorted({min(place, len(text)) for place in [0, *cuts, len(text)]})
    reader = CallReader(style)
    found = [reader.push(text[a:b]) for a, b in itertools.pairwise(places)]
    found.append(reader.close(is_cut))
    whole = read_tool_calls(text, style, is_cut)
    assert "".join(one.content for one in found) == whole.content
    assert tuple(call for one in found for call in one.calls) == whole.calls
    assert is_cut or tagged(GET) in text or whole.content == text


def test_arguments_stay_as_written() -> None:
    """Guards numbers that a float cannot hold: 1e999 would come back as no JSON at all."""
    text = '{"name": "get", "arguments": {"n": 1e999, "m": 12345678901234567890}}'
    (call,) = read_tool_calls(text).calls
    assert call.arguments == '{"n": 1e999, "m": 12345678901234567890}'
    loose = '{ "name":"get","arguments" : {"city":"\u00e9", "n": 1e999} }'
    (call,) = read_tool_calls(loose).calls
    assert call.arguments == '{"city":"\u00e9", "n": 1e999}'


@pytest.mark.parametrize("style", [BARE, HERMES])
def test_a_text_without_calls_may_have_a_schema_of_its_own(style: ToolStyle) -> None:
    """Guards both: an answer that begins like a call, and references of each schema."""
    name = {"type": "string"}
    person = {"properties": {"name": {"$ref": "#/$defs/n"}}, "$defs": {"n": name}}
    grammar = tool_call(TOOLS, "auto", style, answer=({"type": "object", **person}, True))
    calls = [f"{style.begin}{call}{style.end}" for call in (GET, STOP)]
    for text in ('{"name": "Bob"}', '{"name": "get"}', *calls):
        assert accepts(grammar, text), text
    for text in (
        "text",
        '{"name": "Bob", "city": "x"}',
        *(call.replace("Oslo", "O" * 10) for call in calls[:1]),
    ):
        assert not accepts(grammar, text), text
    required = tool_call(TOOLS, "required", style, answer=({"type": "object"}, True))
    assert not accepts(required, "{}")


def test_an_answer_that_is_no_call_flows() -> None:
    """Guards a stream of JSON beside tools: it is held only while it may become a call."""
    reader = CallReader(BARE)
    pieces = [reader.push(piece).content for piece in (' {"na', 'me": "Bo', 'b", "c', 'ity": 1}')]
    assert pieces == ["", "", ' {"name": "Bob", "c', 'ity": 1}']
    assert reader.close(is_cut=True) == ToolText()
