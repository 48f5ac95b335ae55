"""The bodies of the two endpoints that write text."""

from typing import Annotated, Literal

from pydantic import Field

from twotower.serve.fields import Count, Decoding, Record, TokenId, Unsupported

_PROMPT = "must be non-empty text, a non-empty list of token ids, or a list of either"
_MAX_ALTERNATIVES = 20
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Decoding):
    """Body of /v1/completions."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Ids], Field(min_length=1)]
    ) = Field(description=_PROMPT)
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_ALTERNATIVES)] | None = None
    best_of: Literal[1] | None = None
    suffix: Unsupported = None


class TextPart(Record):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Record):
    """The call that a model made."""

    name: str
    arguments: str


class ToolCall(Record):
    """An earlier answer's call."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Record):
    """One turn of a conversation; the fields without effect are those clients send back to us."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None


class Function(Record):
    """What may be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None  # always exact here


class Tool(Record):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Record):
    """The name of one tool."""

    name: str


class ChosenTool(Record):
    """A tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(Decoding):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_ALTERNATIVES)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None  # a reply holds one call, which either value allows
    store: Unsupported = None
    metadata: Unsupported = None
