"""Tool calls as text: the grammar that a model must keep to call tools, and the reading of it.

A call is `{"name": NAME, "arguments": {...}}` in a style that the model was trained on. Tools and
choices have the form of the OpenAI API.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.engine.grammar import Grammar, schema_rule

Tools = Sequence[Mapping[str, Any]]  # as OpenAI's API has them, and validated
CHOICES = ("none", "auto", "required")
_MAX_DEPTH = 100  # of lists and objects
_TOO_DEEP = f"more than {_MAX_DEPTH} lists and objects in one another"
# A call up to its arguments, and one without white space up to somewhere before them.
_OPENING = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(.*)', re.DOTALL
)
_HEAD = '{"name":"'
_NAMED = re.compile(r'\{"name":"(?:[^"\\]|\\.)*(?:\\|"(.*))?')

Wanted = tuple[Mapping[str, object], bool]  # a schema, and whether to the letter
Function = tuple[str, Mapping[str, object], bool]  # name, schema of the arguments, strict


@dataclass(frozen=True)
class ToolStyle:
    """What stands around a call. Without `begin` the call is the whole text, so there is one."""

    begin: str = ""
    end: str = ""


BARE = ToolStyle()  # of the shipped model
HERMES = ToolStyle("<tool_call>\n", "\n</tool_call>")


_SHOWN = """\
You can call functions. They are, one a line:
<tools>
%s
</tools>
To call one, write its name and its arguments between tags, as here:
<tool_call>
{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}
</tool_call>"""


@dataclass(frozen=True)
class ToolCall:
    """One call as it was written."""

    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True)
class ToolText:
    """A text, or a piece of one, taken apart."""

    content: str = ""  # what is no call
    calls: tuple[ToolCall, ...] = ()
    is_cut: bool = False  # whether the text ends inside a call, the last one if its name is there


def tool_call(
    tools: Tools,
    choice: str | Mapping[str, Any] = "auto",
    style: ToolStyle = BARE,
    is_parallel: bool = True,
    answer: Wanted | None = None,
) -> Grammar:
    """What a text must match so that its calls fit the tools, of which there is one or more.

    choice: "auto" (text, or calls), "required" (calls only) or an object that names one function.
    is_parallel: more than one call, where the style can separate them. answer: the schema of a text
    without calls. ValueError (one line) for names and parameters that cannot be.
    """
    functions = [_function(index, tool) for index, tool in enumerate(tools)]
    if len({name for name, _, _ in functions}) < len(functions):
        raise ValueError("tools: two functions have the same name; names must differ")
    chosen = functions if isinstance(choice, str) else [_named(choice, functions)]
    if answer is not None and choice == "auto" and not style.begin:
        return _calls_or_answer(chosen, answer)
    rules = [
        schema_rule(f"arguments_{index}", schema, f"tools: {name}: parameters", is_strict)
        for index, (name, schema, is_strict) in enumerate(chosen)
    ]
    start = _start_rule(style, choice == "auto", is_parallel, answer is not None)
    calls = [_call_rule(index, name) for index, (name, _, _) in enumerate(chosen)]
    names = " | ".join(f"call_{index}" for index in range(len(chosen)))
    text = "\n".join([start, f"call: {names}", *calls])
    if answer is not None and choice == "auto":
        rules.append(schema_rule("answer", answer[0], "json_schema", answer[1]))
    rules.insert(0, {"name": "start", "lark_grammar": text})
    return Grammar("tool_call", json.dumps({"grammars": rules}))


def as_text(turns: Sequence[Mapping[str, object]], tools: Tools) -> list[Mapping[str, object]]:
    """Turns for a template that knows no tools: what it would show of them stands in the system's
    message, and calls and their results in the turns' own texts, in the style HERMES.
    """
    found = [_turn_as_text(turn) for turn in turns]
    if not tools:
        return found
    lines = (json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    shown = _SHOWN % "\n".join(lines)
    if found and found[0]["role"] == "system":
        shown = f"{found.pop(0)['content']}\n\n{shown}"
    return [{"role": "system", "content": shown}, *found]


def _turn_as_text(turn: Mapping[str, object]) -> Mapping[str, object]:
    content, calls = str(turn["content"]), turn.get("tool_calls")
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if not isinstance(calls, list):
        return turn
    written = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    parts = [content, *(f"{HERMES.begin}{call}{HERMES.end}" for call in written)]
    return {"role": turn["role"], "content": "\n".join(filter(None, parts))}


def _calls_or_answer(functions: list[Function], answer: Wanted) -> Grammar:
    """A call without marks or an answer, as one schema: both begin with the same characters, which
    rules beside one another cannot tell apart.
    """
    forms: list[object] = []
    for index, (name, schema, _) in enumerate(functions):
        arguments = _moved(schema, f"#/anyOf/{index}/properties/arguments")
        properties = {"name": {"const": name}, "arguments": arguments}
        forms.append({"type": "object", "properties": properties, "required": [*properties]})
    forms.append(_moved(answer[0], f"#/anyOf/{len(functions)}"))
    is_strict = answer[1] and all(is_strict for _, _, is_strict in functions)
    rule = schema_rule("either", {"anyOf": forms}, "tools", is_strict)
    start = {"name": "start", "lark_grammar": 'start: " "? @either'}
    return Grammar("tool_call", json.dumps({"grammars": [start, rule]}))


def _moved(schema: object, place: str) -> object:
    """A schema whose references are right at another place."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: place + part[1:]
        if key == "$ref" and isinstance(part, str) and part[:1] == "#"
        else _moved(part, place)
        for key, part in schema.items()
    }


def _start_rule(style: ToolStyle, is_optional: bool, is_parallel: bool, has_answer: bool) -> str:
    if not style.begin:
        if not is_optional:
            return 'start: " "? call'
        # text that cannot be the beginning of a call: its first character but one space is no {
        return 'start: " "? call | TEXT?\nTEXT: /( ?[^ {]|  )(.|\\n)*| /'
    begin, end = json.dumps(style.begin), json.dumps(style.end)
    if is_optional and not has_answer:
        calls = "(lead rest)* TEXT?" if is_parallel else "lead rest | TEXT?"
        return f"start: {calls}\nlead[lazy]: /(.|\n)*/ {begin}\nrest: call {end}\nTEXT: /(.|\n)+/"
    more = '("\\n"? whole)*' if is_parallel else ""
    other = ' | " "? @answer' if is_optional else ""
    return f"start: whole {more}{other}\nwhole: {begin} call {end}"


def _call_rule(index: int, name: str) -> str:
    opening = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
    return f'call_{index}: {opening} @arguments_{index} "}}"'


def _function(index: int, tool: Mapping[str, Any]) -> Function:
    """Name and parameters of a tool, and whether they must be kept to the letter."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    if parameters.get("type", "object") != "object":
        raise ValueError(f"tools[{index}].function.parameters must be a schema of type object")
    return function["name"], {**parameters, "type": "object"}, function.get("strict") is True


def _named(choice: Mapping[str, Any], functions: list[Function]) -> Function:
    for known in functions:
        if choice["function"]["name"] == known[0]:
            return known
    names = ", ".join(known for known, _, _ in functions)
    raise ValueError(
        f"tool_choice={choice!r} is unknown; use {', '.join(CHOICES)}, or "
        f'{{"type": "function", "function": {{"name": ...}}}} with one of: {names}'
    )


class CallReader:
    """Takes a text apart while it comes: what can no longer become a call is given out at once, a
    call when it is whole. White space around calls is no content.
    """

    def __init__(self, style: ToolStyle) -> None:
        self._style = style
        self._held = ""  # that may be of a call
        self._blank = ""  # white space that is content if text follows
        self._in_call = self._has_calls = self._has_text = False

    def push(self, text: str) -> ToolText:
        """The next characters of the text."""
        self._held += text
        return self._push_marked() if self._style.begin else ToolText(self._push_bare())

    def _push_bare(self) -> str:
        """Without marks the beginning decides."""
        if not self._in_call and not self._has_text:
            self._in_call = _OPENING.fullmatch(self._held) is not None
            if _is_begun(self._held) and not self._held.startswith("  "):
                return ""
        if self._in_call:
            return ""
        self._has_text = True
        content, self._held = self._held, ""
        return content

    def _push_marked(self) -> ToolText:
        content, calls = "", list[ToolCall]()
        while True:
            mark = self._style.end if self._in_call else self._style.begin
            before, found, after = self._held.partition(mark)
            if not found:
                break
            call = _read_call(before) if self._in_call else None
            if call is not None:
                calls.append(call)
                self._has_calls = True
            else:
                before = f"{self._style.begin}{before}{mark}" if self._in_call else before
                content += self._text(before)
            self._in_call, self._held = not self._in_call, after
        if not self._in_call:
            end = len(self._held) - _num_begun(self._held, self._style.begin)
            content += self._text(self._held[:end])
            self._held = self._held[end:]
        return ToolText(content, tuple(calls))

    def close(self, is_cut: bool = False) -> ToolText:
        """What is left when the text has ended; is_cut: by its length or a stop string."""
        held, begin = self._held, self._style.begin
        if self._in_call or not (begin or self._has_text or held.isspace()):
            written = held[: len(held) - _num_begun(held, self._style.end)]
            if (call := _read_call(written)) is not None:
                return ToolText("", (call,))
            if is_cut and (_is_begun(written) or _OPENING.fullmatch(written)):
                return ToolText("", _read_cut_call(written), is_cut=True)
            held = begin + held
        elif is_cut and 2 * len(held) > len(begin) > 0:
            held = ""  # most of a mark
        return ToolText(self._text(held) + ("" if self._has_calls else self._blank))

    def _text(self, text: str) -> str:
        text = self._blank + text
        content = text.rstrip()
        self._blank = text[len(content) :]
        if self._has_calls and not self._has_text:
            content = content.lstrip()
        self._has_text = self._has_text or content != ""
        return content


def _num_begun(text: str, mark: str) -> int:
    """Length of the longest end of a text with which the mark begins."""
    lengths = range(min(len(text), len(mark)), 0, -1)
    return next((n for n in lengths if mark.startswith(text[-n:])), 0)


def call_record(call: ToolCall) -> dict[str, object]:
    """A call as OpenAI writes it."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def read_tool_calls(text: str, style: ToolStyle = BARE, is_cut: bool = False) -> ToolText:
    """Take a text apart; what is no call stays content. is_cut: as for `CallReader.close`."""
    reader = CallReader(style)
    first, last = reader.push(text), reader.close(is_cut)
    return ToolText(first.content + last.content, first.calls + last.calls, last.is_cut)


def _read_cut_call(text: str) -> tuple[ToolCall, ...]:
    """The call that a text begins, with the arguments that are there; none without its name."""
    found = _OPENING.fullmatch(text)
    try:
        return () if found is None else (ToolCall(json.loads(found[1]), found[2]),)
    except ValueError:  # half an escape
        return ()


def _read_call(text: str) -> ToolCall | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        return None
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    if (found := _OPENING.fullmatch(text)) is not None:  # as written: a number stays what it was
        return ToolCall(name, found[2].rstrip()[:-1].strip())
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _is_begun(text: str) -> bool:
    """Whether a text may become a call whose arguments have not come."""
    text = "".join(text.split())
    if _HEAD.startswith(text):
        return True
    found = _NAMED.fullmatch(text)
    return found is not None and ',"arguments":'.startswith(found[1] or "")


class TooDeep(ValueError):
    """JSON of more levels than anyone means and than recursion goes."""


def parse_json(text: str) -> object:
    """A JSON value in a text of a caller or a model; ValueError for a damaged one, or TooDeep."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise TooDeep(_TOO_DEEP) from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [part for one in inner for part in one if isinstance(part, dict | list)]
        if not level:
            return value
    raise TooDeep(_TOO_DEEP)
