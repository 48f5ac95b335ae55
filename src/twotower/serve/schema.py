"""The bodies of the endpoints that write text, and how a bad one becomes one line.

A field that is unknown is refused; of fields of OpenAI's without effect here `api_fields` says
which values are taken. In a conversation everything is taken that clients keep in one, and what
means nothing here is passed over. What a decoding option may be is the engine's to say
(`GenerateOptions`): here they have types only.

Validation ends at the first thing that is wrong in a list or object: a body of a megabyte could
otherwise have half a million errors, which nobody reads and everybody waits for.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic.functional_validators import PlainValidator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from twotower.arguments import nearest
from twotower.engine import Mode
from twotower.serve.api_fields import UNSERVED, WITHOUT_EFFECT, asks_for_nothing
from twotower.serve.errors import ApiError

RecordT = TypeVar("RecordT", bound="Record")
_PROMPT = "must be non-empty text, a non-empty list of token ids, or a list of either"
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 256
_MAX_ALTERNATIVES = 20
_MAX_ID = 1 << 31
_MAX_CONTAINERS = 100_000  # of a body; to make them takes the interpreter, which all wait for

Count = Annotated[int, Field(ge=1, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=0, lt=_MAX_ID)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=64)]
StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]


def _is_prompt(value: object) -> object:
    prompts = value if isinstance(value, list) and value and not _is_id(value[0]) else [value]
    kind = str if isinstance(prompts[0], str) else list
    for one in prompts:
        if not isinstance(one, kind) or not one or (kind is list and not all(map(_is_id, one))):
            raise PydanticCustomError("prompt", _PROMPT)
    return value


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_ID


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_ID_SCHEMA = {"type": "integer", "minimum": 0, "exclusiveMaximum": _MAX_ID}
_IDS_SCHEMA = {"type": "array", "items": _ID_SCHEMA, "minItems": 1}
_EITHER = [_TEXT_SCHEMA, _IDS_SCHEMA]
# Checked by hand: a union of lists would be tried list by list to its end.
Prompt = Annotated[
    object,
    PlainValidator(_is_prompt),
    WithJsonSchema(
        {"anyOf": [*_EITHER, *({"type": "array", "items": s, "minItems": 1} for s in _EITHER)]}
    ),
]


class Part(BaseModel):
    """A JSON object of a conversation: fields have exactly their types, others are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class Record(Part):
    """A JSON object whose fields are all known."""

    model_config = ConfigDict(extra="forbid")
    unserved: ClassVar[frozenset[str]] = frozenset()  # that this record could have, of the API's

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        """The value without what has no effect; the first field that cannot be taken ends it
        (`extra="forbid"` would list them all).
        """
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, part in value.items():
            if name in known:
                kept[name] = part
            elif name not in cls.unserved:
                raise PydanticCustomError("unknown_field", "{name}", {"name": name[:100]})
            elif name not in WITHOUT_EFFECT and not asks_for_nothing(name, part):
                raise PydanticCustomError("unsupported", "{name}", {"name": name})
        return kept


class StreamOptions(Record):
    """What a stream tells besides text."""

    unserved = frozenset({"include_obfuscation"})
    include_usage: bool = False


class JsonSchema(Record):
    """A schema with the name that OpenAI wants for it."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, object] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Record):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Decoding(Record):
    """How to decode: fields of all endpoints, OpenAI's and ours. What is not given takes the
    checkpoint's default.
    """

    names: ClassVar[Mapping[str, str]] = {}  # of what chat calls otherwise

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None

    mode: Mode | None = None
    block_size: int | None = None
    steps_per_block: int | None = None
    first_token: str | None = None
    drafts: str | None = None
    draft_passes: int | None = None
    confidence_threshold: float | None = None
    verify_threshold: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    schedule: str | None = None
    remask: str | None = None
    adaptive: bool | None = None
    eos_token_id: TokenId | TokenIds | None = None
    ignore_eos: bool | None = None
    deadline_s: Annotated[float, Field(ge=1)] | None = None
    twotower_events: bool | None = None


class TextRequest(Decoding):
    """What completions and chat share besides."""

    max_tokens: int | None = None
    max_new_tokens: int | None = None
    n: Count | None = None
    stop: (
        Annotated[str, Field(max_length=_MAX_STOP_LENGTH)]
        | Annotated[list[StopText], Field(fail_fast=True, max_length=_MAX_STOPS)]
        | None
    ) = None
    seed: int | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, object] | None = None


class CompletionRequest(TextRequest):
    """Body of /v1/completions."""

    unserved = frozenset({"best_of", "suffix", "store", "metadata"})
    prompt: Prompt = Field(description=_PROMPT)
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_ALTERNATIVES)] | Literal[False] | None = None

    @property
    def num_alternatives(self) -> int | None:
        """To each token, where log-probabilities are wanted."""
        return None if self.logprobs is False else self.logprobs


class ContentPart(Part):
    """A part of a message; what it says stands in one of these."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Part):
    """The call that a model made; a function without parameters has "" at some servers."""

    name: str
    arguments: str | dict[str, object] | None = None


class CalledTool(Part):
    """The call of a tool that takes text."""

    name: str
    input: str


class ToolCall(Part):
    """An earlier answer's call."""

    id: str | None = None
    function: CalledFunction | None = None
    custom: CalledTool | None = None


class Message(Part):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=1024)] | None = (
        None
    )
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    refusal: str | None = None


class Function(Record):
    """What may be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


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


class AllowedTools(Record):
    """The tools that may be called, or must."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Field(fail_fast=True, min_length=1, max_length=128)]


class AllowedChoice(Record):
    """The same, as a choice."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(TextRequest):
    """Body of /v1/chat/completions."""

    unserved = frozenset(
        {
            *("audio", "function_call", "functions", "metadata", "modalities", "moderation"),
            *("prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
            *("reasoning_effort", "service_tier", "store", "verbosity", "web_search_options"),
        }
    )
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=1024)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_ALTERNATIVES)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


def parse(record: type[RecordT], body: bytes) -> RecordT:
    """The record in a JSON body; ApiError 400 (one line) that names the first field at fault."""
    if body.count(b"[") + body.count(b"{") > _MAX_CONTAINERS:
        message = f"the body has more than {_MAX_CONTAINERS} lists and objects; send less"
        raise ApiError(400, message, code="too_large")
    try:
        value = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="json_invalid") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="json_invalid")
    return validated(record, value)


def validated(record: type[RecordT], value: object) -> RecordT:
    """The record of a JSON value; ApiError likewise."""
    try:
        return record.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise _refusal(record, _telling(found)) from None


def _refusal(record: type[Record], problem: ErrorDetails) -> ApiError:
    path, message = _path(problem["loc"]), problem["msg"]
    name = ".".join(path)
    match problem["type"]:
        case "unknown_field":
            name = ".".join([*path, message])
            return ApiError(400, _unknown(record, name), param=name, code="unknown_field")
        case "unsupported":
            name, reason = ".".join([*path, message]), UNSERVED[message].reason
            told = f"{name} is not supported: {reason}"
            return ApiError(400, told, param=name, code="unsupported_field")
        case "too_short" | "too_long":  # "... after validation, not 0" is for pydantic's users
            message = message.partition(" after validation")[0]
    told = f"{name}: {message[:1].lower()}{message[1:]}"
    return ApiError(400, told, param=name, code="bad_value")


def _telling(problems: list[ErrorDetails]) -> ErrorDetails:
    """Of a field with several possible types, what is wrong with the one that was meant."""
    same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    others = [problem for problem in same_field if not problem["type"].endswith("_type")]
    return (others or same_field)[0]


def _path(location: tuple[int | str, ...]) -> list[str]:
    """Names from the body's field inwards, without the types that were tried on the way."""
    return [str(part) for number, part in enumerate(location) if not number or _is_name(part)]


def _is_name(part: int | str) -> bool:
    """Whether a part of a location is a field or a number, not a type such as list[int]."""
    text = str(part)
    is_type = text in ("str", "int", "float", "bool", "none") or "[" in text or "-" in text
    return isinstance(part, int) or (not is_type and not text[:1].isupper())


def _unknown(record: type[BaseModel], name: str) -> str:
    """What to say of a field that a body of this kind cannot have."""
    known = [field.alias or key for key, field in record.model_fields.items()]
    near = "" if "." in name else nearest(name, known)
    return f"{name} is not a field of this request{near}; see /openapi.json for the fields"
