"""A conversation into token ids, by the checkpoint's own Jinja template."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from twotower.engine.fork_server import Process, ProcessDied, Root
from twotower.serve import template_child as child
from twotower.serve.errors import ApiError, bad_value
from twotower.serve.options import check_variables
from twotower.serve.schema import ChatRequest, ContentPart, Message, ToolCall
from twotower.serve.tool_calls import BARE, HERMES, TooDeep, ToolStyle, as_text, parse_json
from twotower.tokenizer import Tokenizer, read_chat_template

_RENDER_CPU_S, _RENDER_S = 1.0, 10.0
_RENDER_MEMORY = 256 << 20
_MAX_PIECES = 1 << 16  # of a text
_MARK = "\ue002 "  # where a message that is to be continued ends, and whether blanks are kept
_CHARS_PER_TOKEN = 8  # text has seldom more
_MAX_AT_A_CUT = 64  # tokens by which the beginning of a text may differ from that of its ids
# As the shipped model's training text writes questions and tool calls; see docs/serving.md.
PLAIN = """\
{{- bos_token }}
{%- set asks, answers = ('User: ', 'Call:') if tools else ('Q: ', 'A:') %}
{%- for message in messages if message.role == 'system' %}{{ message.content }}
{% endfor %}
{%- if tools %}Tools:
{% for tool in tools %}{{ tool.function.name }}(
{%- for name, field in ((tool.function.parameters or {}).properties or {}).items() %}
{{- name }}: {{ field.type or 'string' }}{{ ', ' if not loop.last }}
{%- endfor %})
{% endfor %}{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}{{ asks }}{{ message.content }}
{% elif message.role == 'tool' %}Result: {{ message.content }}
{% elif message.tool_calls %}{% for call in message.tool_calls %}Call: {{ {'name':
call.function.name, 'arguments': call.function.arguments} | tojson }}
{% endfor %}{% else %}{{ answers }} {{ message.content }}
{% endif %}{% endfor %}
{{- answers }}"""


Turns = Sequence[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """What a template is asked for beside messages and tools: `variables` of its own, such as
    enable_thinking; continues_last: the rest of the last message instead of the reply to it.
    """

    variables: Mapping[str, object] = field(default_factory=dict)
    continues_last: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template's source and the special tokens that it may write."""

    source: str
    special: Mapping[str, str]  # such as bos_token, by the names that templates use
    strips_reply: bool = False  # whether a reply's first blank belongs to the format
    variables: Mapping[str, object] = field(default_factory=dict)  # where a request gives none

    @property
    def tool_style(self) -> ToolStyle:
        """How the model was taught to write calls, as far as its template shows, or is told to."""
        has_tags = HERMES.begin.strip() in self.source or not self.has_tools
        return HERMES if has_tags else BARE

    @property
    def has_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return "tools" in self.source

    def encode(
        self,
        messages: Turns,
        tools: Sequence[Mapping[str, object]] | None,
        tokenizer: Tokenizer,
        max_tokens: int,
        process: Process | None = None,
        manner: Manner = Manner(),
    ) -> list[int]:
        """Token ids of a prompt for the next reply; ApiError 400 where the template refuses, takes
        too much, or makes more tokens than that. process: one for many prompts of one caller, from
        `process`; by itself each prompt gets its own.
        """
        process = process or self.process(tokenizer)
        pieces = _pieces(process, messages, tools, max_tokens, self._filled(manner))
        return encode_pieces(tokenizer, pieces, max_tokens)

    def text(self, messages: Turns, process: Process, manner: Manner = Manner()) -> str:
        """A prompt as text; ApiError likewise."""
        pieces = _pieces(process, messages, None, _MAX_PIECES, self._filled(manner))
        return "".join(part for part, _ in pieces)

    def _filled(self, manner: Manner) -> Manner:
        return replace(manner, variables={**self.variables, **manner.variables})

    def process(self, tokenizer: Tokenizer) -> Process:
        """A process of its own that renders; ApiError 400 where the template does not compile."""
        variables = tuple(sorted(self.special.items()))
        with _refusals():
            return _root(self.source, variables, tokenizer.special_texts).copy()


def _pieces(
    process: Process,
    messages: Turns,
    tools: Sequence[Mapping[str, object]] | None,
    most: int,
    manner: Manner,
) -> list[tuple[str, bool]]:
    """Parts of a prompt, each with whether special tokens in it are meant; one more than `most` if
    there are too many.
    """
    if manner.continues_last:
        last = messages[-1]
        messages = [*messages[:-1], {**last, "content": f"{last['content']}{_MARK}"}]
    context = {**manner.variables, "messages": messages, "tools": tools}
    context["add_generation_prompt"] = not manner.continues_last
    request = json.dumps({"context": context, "most_pieces": most}).encode()
    with _refusals():
        reply, _ = process.ask(child.RENDER + request, _RENDER_CPU_S, _RENDER_S)
    pieces: list[tuple[str, bool]] = json.loads(reply)
    is_whole = len(pieces) <= most
    return _before_mark(pieces) if manner.continues_last and is_whole else pieces


def _before_mark(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    for place in reversed(range(len(pieces))):
        text, is_meant = pieces[place]
        before, mark, behind = text.rpartition(_MARK.strip())
        if mark:  # a template that strips messages has left out the blank behind it
            before = before if behind.startswith(" ") else before.rstrip()
            return [*pieces[:place], (before, is_meant)]
    raise _refusal("does not show the last message, so it cannot be continued")


@contextmanager
def _refusals() -> Iterator[None]:
    """What a process says about its template, as ApiError 400."""
    try:
        yield
    except ProcessDied:
        raise _refusal("takes too much time or memory") from None
    except ValueError as error:
        raise _refusal(str(error)) from None


def _refusal(reason: str) -> ApiError:
    return ApiError(400, f"messages: the model's chat template {reason}", param="messages")


@lru_cache(maxsize=8)
def _root(
    source: str, variables: tuple[tuple[str, str], ...], special_texts: tuple[str, ...]
) -> Root:
    """The process that has compiled a template."""
    given = {"source": source, "variables": dict(variables), "special": special_texts}
    request = child.COMPILE + json.dumps(given).encode()
    return Root(Path(child.__file__), partial(_compile, request))


def _compile(request: bytes, process: Process) -> None:
    process.limit_memory(_RENDER_MEMORY)
    process.ask(request, _RENDER_CPU_S, _RENDER_S)


def encode_pieces(
    tokenizer: Tokenizer,
    pieces: Iterable[tuple[str, bool]],
    max_tokens: int,
    start: Sequence[int] = (),
) -> list[int]:
    """Token ids of parts of a text, each with whether special tokens in it are meant, after those
    at the start.

    ApiError 400 for more than max_tokens, which is seen without encoding all of a long text.
    """
    ids = list(start)
    for text, allow_special in pieces:
        try:
            ids += _encode(tokenizer, text, allow_special, max_tokens - len(ids))
        except ValueError as error:  # the tokenizer's own rules fail on it
            raise ApiError(400, f"prompt: {error}", param="prompt") from None
        check_length(len(ids), max_tokens)
    return ids


def _encode(tokenizer: Tokenizer, text: str, allow_special: bool, most: int) -> list[int]:
    """All token ids, or more than `most`."""
    beginning = text[: _CHARS_PER_TOKEN * most + 1]
    ids = tokenizer.encode(beginning, allow_special=allow_special)
    if len(beginning) == len(text) or len(ids) > most + _MAX_AT_A_CUT:
        return ids
    return tokenizer.encode(text, allow_special=allow_special)


def check_length(num_tokens: int, max_tokens: int) -> None:
    """ApiError 400 for a prompt that is too long."""
    if num_tokens > max_tokens:
        raise ApiError(
            400,
            f"prompt: is too long; this server reads at most {max_tokens} tokens",
            param="prompt",
            code="context_length_exceeded",
        )


def read_template(folder: Path, instead: Path | None = None) -> ChatTemplate | None:
    """The template of a folder, or of the file instead, if any; ValueError if it cannot be read."""
    source, special = read_chat_template(folder, instead)
    return None if source is None else ChatTemplate(source=source, special=special)


def plain_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The format of the shipped model."""
    bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    return ChatTemplate(source=PLAIN, special={"bos_token": bos}, strips_reply=True)


def encode_chat(
    body: ChatRequest,
    name: str,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    max_tokens: int,
) -> list[int]:
    """Token ids of the prompt; ApiError 400 without a template or where it refuses.

    name: of the model.
    """
    if template is None:
        raise ApiError(
            400,
            f"model {name!r} has no chat template; use /v1/completions, or start the "
            "server with --chat-template FILE",
            code="no_chat_template",
        )
    # A caller who forbids calls is answered as if there were no tools.
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    turns: list[Mapping[str, object]] = [
        _turn(number, message) for number, message in enumerate(body.messages)
    ]
    tool_records = None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools]
    if not template.has_tools:
        turns, tool_records = as_text(turns, tool_records or ()), None
    ids = template.encode(turns, tool_records, tokenizer, max_tokens, manner=_manner(body))
    if not ids:
        raise ApiError(400, "messages: the chat template makes no text of them", param="messages")
    return ids


def _manner(body: ChatRequest) -> Manner:
    variables, continues_last = body.chat_template_kwargs or {}, body.continue_final_message is True
    try:
        check_variables(variables)
    except ValueError as error:
        raise bad_value(error) from None
    if body.add_generation_prompt is continues_last:
        must = "false with" if continues_last else "true without"
        raise ApiError(
            400,
            f"add_generation_prompt: must be {must} continue_final_message; leave it out",
            param="add_generation_prompt",
        )
    last = body.messages[-1]
    if continues_last and (last.role != "assistant" or _calls(last)):
        raise ApiError(
            400,
            "continue_final_message: the last message must be the assistant's, without calls",
            param="continue_final_message",
        )
    return Manner(variables=variables, continues_last=continues_last)


# What clients call parts of text, and parts of an answer that are none of what it said.
_TEXTS = ("text", "input_text", "output_text", "refusal")
_NOT_SAID = ("thinking", "redacted_thinking", "reasoning")
_ROLES = {"developer": "system", "function": "tool"}


def _turn(number: int, message: Message) -> dict[str, object]:
    """A message as templates know it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(_said(number, part) for part in content)
    calls = _calls(message)
    if content is None and message.role in ("system", "developer", "user"):
        raise ApiError(400, f"messages.{number}.content: is missing; give text", param="messages")
    turn: dict[str, object] = {
        "role": _ROLES.get(message.role, message.role),
        "content": content or message.refusal or "",
    }
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _said(number: int, part: ContentPart) -> str:
    if part.type in _NOT_SAID:
        return ""
    if part.type not in _TEXTS:
        message = f"messages.{number}.content: a part of type {part.type!r} is not text, and this"
        raise ApiError(400, f"{message} model reads text only", param="messages")
    return part.text or part.refusal or ""


def _calls(message: Message) -> list[dict[str, object]]:
    """The calls that a message holds, in the one form that templates know."""
    calls = list(message.tool_calls or ())
    if message.function_call is not None and not calls:
        calls = [ToolCall(function=message.function_call)]
    return [
        {"id": call.id or f"call_{place}", "type": "function", "function": function}
        for place, call in enumerate(calls)
        if (function := _called(call)) is not None
    ]


def _called(call: ToolCall) -> dict[str, object] | None:
    if call.custom is not None:
        return {"name": call.custom.name, "arguments": {"input": call.custom.input}}
    if call.function is None:
        return None
    return {"name": call.function.name, "arguments": _arguments(call.function.arguments)}


def _arguments(given: str | dict[str, object] | None) -> object:
    """Arguments as a value. A call that was cut has half of one: that stays the text it is."""
    if not isinstance(given, str):
        return given or {}
    try:
        return parse_json(given or "{}")
    except TooDeep as error:
        raise ApiError(400, f"messages: tool_calls: arguments: {error}", param="messages") from None
    except ValueError:
        return given
