"""/v1/responses, as far as it is a conversation: its body as one of chat, its answers as items.

Nothing is kept between requests: all earlier items come with the body.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from twotower.engine import Completion
from twotower.serve.answers import Chunks
from twotower.serve.errors import ApiError
from twotower.serve.pieces import Logprobs, Replies
from twotower.serve.schema import ChatRequest, Decoding, Function, JsonSchema, Record, validated
from twotower.serve.schema import ChosenFunction as Chosen
from twotower.serve.tool_calls import ToolCall, ToolText


class FunctionTool(Function):
    """A tool; functions are the only kind."""

    type: Literal["function"]


class ChosenFunction(Chosen):
    """A tool that must be called."""

    type: Literal["function"]


class AllowedTools(Record):
    """The tools that may be called, or must."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(fail_fast=True, min_length=1, max_length=128)]


class TextFormat(JsonSchema):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Record):
    """What the text of an answer is."""

    unserved = frozenset({"verbosity"})
    format: TextFormat | None = None


class ResponsesRequest(Decoding):
    """Body of /v1/responses."""

    unserved = frozenset(
        {
            *("access_programs", "background", "background_options", "context_management"),
            *("conversation", "image", "include", "max_tool_calls", "metadata", "moderation"),
            *("previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_options"),
            *("prompt_cache_retention", "reasoning", "service_tier", "store", "top_logprobs"),
            "truncation",
        }
    )
    names = MappingProxyType(
        {
            "messages": "input",
            "response_format": "text.format",
            "max_completion_tokens": "max_output_tokens",
            "max_tokens": "max_output_tokens",
        }
    )
    input: str | Annotated[list[dict[str, object]], Field(fail_fast=True, max_length=1024)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same question to /v1/chat/completions; ApiError for items that mean nothing there."""
    given = body.model_dump(exclude_none=True, include=set(Decoding.model_fields))
    given["messages"] = _messages(body)
    given["max_completion_tokens"] = body.max_output_tokens
    given["parallel_tool_calls"] = body.parallel_tool_calls
    given["tools"] = [
        {"type": "function", "function": tool.model_dump(exclude={"type"})}
        for tool in body.tools or ()
    ]
    match body.tool_choice:
        case ChosenFunction(name=name):
            given["tool_choice"] = {"type": "function", "function": {"name": name}}
        case AllowedTools(mode=mode, tools=tools):
            chosen = [{"type": "function", "function": {"name": one.name}} for one in tools]
            allowed = {"mode": mode, "tools": chosen}
            given["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        case choice:
            given["tool_choice"] = choice
    if body.text is not None and (form := body.text.format) is not None:
        named = form.model_dump(by_alias=True, exclude={"type"})
        has_schema = form.type == "json_schema"
        given["response_format"] = {
            "type": form.type,
            **({"json_schema": named} if has_schema else {}),
        }
    return validated(ChatRequest, given)


def _messages(body: ResponsesRequest) -> list[dict[str, object]]:
    items = body.input
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    messages: list[dict[str, object]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    for number, item in enumerate(items):
        match item:
            case {"type": "reasoning"}:
                pass  # of another model: ours has none
            case {"type": "function_call", "name": name, "arguments": arguments}:
                function = {"name": name, "arguments": arguments}
                _add_call(messages, {"id": item.get("call_id"), "function": function})
            case {"type": "custom_tool_call", "name": name, "input": written}:
                custom = {"name": name, "input": written}
                _add_call(messages, {"id": item.get("call_id"), "custom": custom})
            case {"type": "function_call_output" | "custom_tool_call_output", "output": output}:
                turn = {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
                messages.append(turn)
            case {"role": role} if item.get("type", "message") == "message":
                messages.append({"role": role, "content": item.get("content")})
            case _:
                raise ApiError(400, _no_item(number, item.get("type")), param="input")
    return messages


def _no_item(number: int, kind: object) -> str:
    if kind == "item_reference":
        return f"input.{number}: nothing is kept between requests; send the item itself"
    return (
        f"input.{number}: an item of type {str(kind)[:100]!r} is not supported or not whole; send "
        "messages, function calls and their outputs"
    )


def _add_call(messages: list[dict[str, object]], call: dict[str, object]) -> None:
    """A call is a part of the assistant's turn that it ends."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    calls = messages[-1].setdefault("tool_calls", [])
    assert isinstance(calls, list)
    calls.append(call)


_ECHOED = (
    *("instructions", "max_output_tokens", "parallel_tool_calls", "temperature", "text"),
    *("tool_choice", "tools", "top_p", "user", "safety_identifier"),
)
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponseShape:
    """`response` objects, and the events of one that comes in pieces."""

    def __init__(self, model: str, replies: Replies, body: ResponsesRequest) -> None:
        self._replies = replies
        echoed = body.model_dump(by_alias=True, include=set(_ECHOED))
        defaults = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
        self._head: dict[str, object] = {
            "id": _new("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **echoed,
            **{name: value for name, value in defaults.items() if echoed[name] is None},
            "error": None,
            "metadata": {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }
        self._items: list[dict[str, object]] = []  # of the output so far
        self._message: dict[str, object] | None = None  # the one that text goes to
        self._text = ""
        self._num_events = 0

    def whole(self, completions: Sequence[Completion], usage: object) -> dict[str, object]:
        self._add(self._replies.whole(completions[0]))
        self._end(completions[0])
        return self._response(completions[0], usage)

    def begin(self, index: int) -> Chunks:
        response = self._response(None, None)
        return [
            self._event(f"response.{kind}", response=response)
            for kind in ("created", "in_progress")
        ]

    def text(self, index: int, text: str, logprobs: Logprobs) -> Chunks:
        return self._add(self._replies.push(index, text))

    def end(self, index: int, completion: Completion) -> Chunks:
        rest = self._add(self._replies.close(index, completion))
        return [*rest, *self._end(completion)]

    def usage(self, completions: Sequence[Completion], usage: object) -> Chunks:
        response = self._response(completions[0], usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def _response(self, completion: Completion | None, usage: object) -> dict[str, object]:
        reason = _INCOMPLETE.get(completion.finish_reason) if completion else None
        status = "in_progress" if completion is None else "incomplete" if reason else "completed"
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": reason} if reason else None,
            "output": list(self._items),
            "usage": _usage(usage) if isinstance(usage, Mapping) else None,
        }

    def _add(self, taken: ToolText) -> Chunks:
        """What is known of the output now, as events."""
        events = self._add_text(taken.content) if taken.content else []
        for call in taken.calls:
            status = "incomplete" if taken.is_cut else "completed"
            events += [*self._close("completed"), *self._add_call(call, status)]
        return events

    def _add_text(self, text: str) -> Chunks:
        events: Chunks = []
        if self._message is None:
            self._text = ""
            self._message = {"id": _new("msg"), "type": "message", "role": "assistant"}
            opened = {**self._message, "status": "in_progress", "content": []}
            part = {**self._of_message(), "part": _part("")}
            events = [
                self._event(
                    "response.output_item.added", item=opened, output_index=len(self._items)
                ),
                self._event("response.content_part.added", **part),
            ]
        self._text += text
        delta = {**self._of_message(), "delta": text, "logprobs": []}
        return [*events, self._event("response.output_text.delta", **delta)]

    def _end(self, completion: Completion) -> Chunks:
        """End the output; one without items gets a message without text."""
        events = [] if self._items or self._message else self._add_text("")
        is_cut = completion.finish_reason in _INCOMPLETE
        return [*events, *self._close("incomplete" if is_cut else "completed")]

    def _close(self, status: str) -> Chunks:
        """End the message that text goes to, if there is one."""
        if self._message is None:
            return []
        of_message, part = self._of_message(), _part(self._text)
        item = {**self._message, "status": status, "content": [part]}
        done = {**of_message, "text": self._text, "logprobs": []}
        self._message = None
        return [
            self._event("response.output_text.done", **done),
            self._event("response.content_part.done", **of_message, part=part),
            self._done(item),
        ]

    def _add_call(self, call: ToolCall, status: str) -> Chunks:
        item: dict[str, object] = {
            **{"id": _new("fc"), "type": "function_call", "call_id": _new("call")},
            **{"name": call.name, "arguments": call.arguments, "status": status},
        }
        opened = {**item, "arguments": "", "status": "in_progress"}
        where = {"item_id": item["id"], "output_index": len(self._items)}
        done = {"name": call.name, "arguments": call.arguments}
        return [
            self._event("response.output_item.added", item=opened, output_index=len(self._items)),
            self._event("response.function_call_arguments.delta", **where, delta=call.arguments),
            self._event("response.function_call_arguments.done", **where, **done),
            self._done(item),
        ]

    def _done(self, item: dict[str, object]) -> dict[str, object]:
        self._items.append(item)
        place = len(self._items) - 1
        return self._event("response.output_item.done", item=item, output_index=place)

    def _of_message(self) -> dict[str, object]:
        assert self._message is not None
        place = {"output_index": len(self._items), "content_index": 0}
        return {"item_id": self._message["id"], **place}

    def _event(self, kind: str, **given: object) -> dict[str, object]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **given}


def _part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Mapping[str, object]) -> dict[str, object]:
    """The counts of chat by the names that they have here, and our own."""
    ours = ("nfe", "context_forwards", "tokens_per_nfe")
    details = usage["prompt_tokens_details"]
    assert isinstance(details, dict)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cache_write_tokens": 0, **details},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        **{name: usage[name] for name in ours},
    }


def _new(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
