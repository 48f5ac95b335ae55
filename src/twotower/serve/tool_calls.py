"""Tool calls as text: the grammar that a model must keep to call tools, and the reading of it.

A call is `{"name": NAME, "arguments": {...}}` in a style that the model was trained on. Tools and
choices have the form of the OpenAI API.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twotower.engine.grammar import Grammar, schema_rule

Tools = Sequence[Mapping[str, object]]
CHOICES = ("none", "auto", "required")
_MOST_DEPTH = 100  # of lists and objects
_TOO_DEEP = f"more than {_MOST_DEPTH} lists and objects in one another"
_NO_ARGUMENTS: dict[str, object] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolStyle:
    """What stands around a call. Without `begin` the call is the whole text, so there is one."""

    begin: str = ""
    end: str = ""


BARE = ToolStyle()  # of the shipped model
HERMES = ToolStyle("<tool_call>\n", "\n</tool_call>")


@dataclass(frozen=True)
class ToolCall:
    """One call as it was written."""

    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True)
class ToolText:
    """A text, taken apart."""

    content: str  # what is no call
    calls: tuple[ToolCall, ...]


def tool_call(
    tools: Tools,
    choice: str | Mapping[str, object] = "auto",
    style: ToolStyle = BARE,
    is_parallel: bool = True,
) -> Grammar | None:
    """What a text must match so that its calls fit the tools; None where it need not match.

    choice: "none", "auto" (text, or calls), "required" (calls only) or an object that names one
    function. is_parallel: more than one call, where the style can separate them. ValueError (one
    line) for unusable tools or choice.
    """
    functions = [_function(index, tool) for index, tool in enumerate(tools)]
    if len({name for name, _ in functions}) < len(functions):
        raise ValueError("tools: two functions have the same name; names must differ")
    if choice == "none":
        return None
    if not functions:
        raise ValueError("tools: none are given; give one, or tool_choice='none'")
    chosen = functions if choice in CHOICES else [_named(choice, functions)]
    rules: list[dict[str, object]] = [
        schema_rule(f"arguments_{index}", schema, f"tools: {name}: parameters")
        for index, (name, schema) in enumerate(chosen)
    ]
    start = _start_rule(style, choice == "auto", is_parallel)
    calls = [_call_rule(index, name) for index, (name, _) in enumerate(chosen)]
    names = " | ".join(f"call_{index}" for index in range(len(chosen)))
    text = "\n".join([start, f"call: {names}", *calls])
    rules.insert(0, {"name": "start", "lark_grammar": text})
    return Grammar("tool_call", json.dumps({"grammars": rules}))


def _start_rule(style: ToolStyle, is_optional: bool, is_parallel: bool) -> str:
    if not style.begin:
        if not is_optional:
            return 'start: " "? call'
        # text that cannot be the beginning of a call: its first character but one space is no {
        return 'start: " "? call | TEXT?\nTEXT: /( ?[^ {]|  )(.|\\n)*| /'
    begin, end = json.dumps(style.begin), json.dumps(style.end)
    if is_optional:
        calls = "(lead rest)* TEXT?" if is_parallel else "lead rest | TEXT?"
        return f"start: {calls}\nlead[lazy]: /(.|\\n)*/ {begin}\nrest: call {end}\nTEXT: /(.|\\n)+/"
    more = '("\\n"? whole)*' if is_parallel else ""
    return f"start: whole {more}\nwhole: {begin} call {end}"


def _call_rule(index: int, name: str) -> str:
    return f'call_{index}: {json.dumps(_opening(name))} @arguments_{index} "}}"'


def _opening(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '


def _function(index: int, tool: object) -> tuple[str, Mapping[str, object]]:
    """Name and parameters of a tool."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not function:
        raise ValueError(
            f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}'
        )
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ValueError(f"tools[{index}].function.name={name!r} must be a text that is not empty")
    parameters = function.get("parameters")
    parameters = _NO_ARGUMENTS if parameters is None else parameters
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(f"tools[{index}].function.parameters must be a schema of type object")
    return name, {**parameters, "type": "object"}


def _named(
    choice: object, functions: list[tuple[str, Mapping[str, object]]]
) -> tuple[str, Mapping[str, object]]:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    for known, parameters in functions:
        if name is not None and name == known:
            return known, parameters
    names = ", ".join(known for known, _ in functions)
    raise ValueError(
        f"tool_choice={choice!r} is unknown; use {', '.join(CHOICES)}, or "
        f'{{"type": "function", "function": {{"name": ...}}}} with one of: {names}'
    )


def split_calls(text: str, style: ToolStyle | None) -> tuple[str, list[dict[str, object]]]:
    """Text and calls of a reply, as OpenAI writes them; without a style there are no calls."""
    if style is None:
        return text, []
    taken = read_tool_calls(text, style)
    calls: list[dict[str, object]] = [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in taken.calls
    ]
    return taken.content, calls


def read_tool_calls(text: str, style: ToolStyle = BARE) -> ToolText:
    """Take a text apart; what is no whole call stays content."""
    if not style.begin:
        call = _read_call(text)
        return ToolText(text, ()) if call is None else ToolText("", (call,))
    content, calls = "", []
    while style.begin in text:
        before, _, rest = text.partition(style.begin)
        written, end, after = rest.partition(style.end)
        call = _read_call(written) if end else None
        if call is None:
            break
        calls.append(call)
        content, text = content + before, after
    return ToolText((content + text).strip() if calls else content + text, tuple(calls))


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
    opening = _opening(name)
    if text.strip().startswith(opening):  # as written: a number stays what it was
        return ToolCall(name, text.strip()[len(opening) : -1].strip())
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def parse_json(text: str) -> object:
    """A JSON value in a text of a caller or a model; ValueError for one that is damaged, or deeper
    than anyone means and than recursion goes.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [part for one in inner for part in one if isinstance(part, dict | list)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)
