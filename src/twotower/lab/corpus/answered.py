"""Tools are shown and the answer is text: no tool fits, none is needed, or one has been called.

For training alone, so that a model does not call whatever it is shown. Keys are those of what is
asked: what "tools", "math" and "refusal" hold out is not taught here.
"""

import json
import re
from collections.abc import Callable
from random import Random

from twotower.lab.corpus.document import Draft, lines
from twotower.lab.corpus.tools import (
    SIGNATURES,
    TOOLS,
    ToolForm,
    draw_arguments,
    draw_value,
    write_prompt,
)

NO_TOOL = "None of these tools can do that."
TALK = tuple(lines("tools", "talk"))
RESULTS = tuple(lines("tools", "results"))
_CALCULATING = ("add_numbers", "multiply")
_SLOT = re.compile(r"\{(\w+)\}")
# A question alone, as "math" and "refusal" write it.
_QUESTION = re.compile(r"(?:Q|User): (.*)\n(?:A|Assistant):", re.DOTALL)


def draw(rng: Random) -> Draft:
    """Draw a request that no shown tool can do, small talk, or a request with a tool's result."""
    return rng.choice((_draw_missing, _draw_talk, _draw_result, _draw_result))(rng)


def with_tools(draw_question: Callable[[Random], Draft]) -> Callable[[Random], Draft]:
    """Drafts of another category with tools beside the question, which needs none of them."""
    tools = [tool for tool in TOOLS if tool.name not in _CALCULATING]

    def draw_it(rng: Random) -> Draft:
        draft = draw_question(rng)
        found = _QUESTION.fullmatch(draft.prompt)
        assert found is not None
        return _answered(draft.key, _show(rng, tools), found[1], draft.completion)

    return draw_it


def _draw_missing(rng: Random) -> Draft:
    tool, key, request, _ = _call(rng)
    shown = _show(rng, [other for other in TOOLS if other is not tool])
    return _answered(key, shown, request, f" {NO_TOOL}")


def _draw_talk(rng: Random) -> Draft:
    phrase = rng.choice(TALK)
    return _answered(phrase, _show(rng, TOOLS), phrase, f" {NO_TOOL}")


def _draw_result(rng: Random) -> Draft:
    _, call, request, shown = _call(rng)
    result = _SLOT.sub(lambda slot: str(draw_value(slot[1], rng)), rng.choice(RESULTS))
    asked = f"{request}\nCall: {call}\nResult: {result}"
    return _answered(call, shown, asked, f" The result is {result}.")


def _call(rng: Random) -> tuple[ToolForm, str, str, list[ToolForm]]:
    """A tool, a call of it, a request for that, and it among others."""
    tool = rng.choice(TOOLS)
    arguments = draw_arguments(tool, rng)
    call = json.dumps({"name": tool.name, "arguments": arguments})
    others = _show(rng, [other for other in TOOLS if other is not tool])
    shown = rng.sample([tool, *others[1:]], len(others))
    return tool, call, rng.choice(tool.requests).format(**arguments), shown


def _show(rng: Random, tools: tuple[ToolForm, ...] | list[ToolForm]) -> list[ToolForm]:
    return rng.sample(tools, rng.choice((1, 2, 2, 3)))


def _answered(key: str, shown: list[ToolForm], asked: str, completion: str) -> Draft:
    prompt = write_prompt([SIGNATURES[tool.name] for tool in shown], asked)
    text = completion.removeprefix(" ")
    return Draft(key=key, prompt=prompt, completion=completion, answer=lambda: {"expected": text})
