"""Fields that both endpoints share, and how a bad body becomes one line that names its field.

A field that is not listed here or in `schema.py` is refused. Fields of OpenAI's that this server
cannot honour are listed with the values that ask for nothing; any other value is refused.
"""

import difflib
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.functional_validators import AfterValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from twotower.engine import Mode
from twotower.engine.options import LEAST_TOP_P
from twotower.serve.errors import ApiError

RecordT = TypeVar("RecordT", bound="Record")
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 256

Count = Annotated[int, Field(ge=1, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]


def _is_neutral(value: object) -> object:
    if value:
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
    return value


# What asks for nothing, in any of the types that OpenAI's fields have.
Unsupported = Annotated[
    float | bool | str | list[object] | dict[str, object] | None,
    AfterValidator(_is_neutral),
    WithJsonSchema({"enum": [None, False, 0, "", [], {}]}),
]


class Record(BaseModel):
    """A JSON object whose fields are all known and of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Record):
    """What a stream tells besides text."""

    include_usage: bool = False
    include_obfuscation: Unsupported = None


class JsonSchema(Record):
    """A schema with the name that OpenAI wants for it."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None  # always exact here


class ResponseFormat(Record):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Decoding(Record):
    """How to decode: OpenAI's fields and ours. What is not given takes the checkpoint's default."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=LEAST_TOP_P, le=1)] | None = None
    n: Count | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=_MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None
    logit_bias: Unsupported = None

    mode: Mode | None = None
    block_size: Count | None = None
    steps_per_block: Count | None = None
    first_token: str | None = None
    draft_passes: Count | None = None
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    verify_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Count | None = None
    schedule: str | None = None
    remask: str | None = None
    adaptive: bool | None = None
    ignore_eos: bool | None = None
    deadline_s: Annotated[float, Field(ge=1)] | None = None
    twotower_events: bool | None = None


def parse(record: type[RecordT], body: bytes) -> RecordT:
    """The record in a JSON body; ApiError 400 (one line) that names the first field at fault."""
    try:
        return record.model_validate_json(body)
    except ValidationError as error:
        problem = _telling(error.errors(include_url=False, include_context=False))
    path = _path(problem)
    name = ".".join(map(str, path))
    match problem["type"]:
        case "json_invalid":
            raise ApiError(400, f"the body is not JSON: {problem['msg']}", code="json_invalid")
        case "extra_forbidden":
            raise ApiError(400, _unknown(record, name), param=name, code="unknown_field")
        case "unsupported":
            message = f"{name} {problem['msg']}"
            raise ApiError(400, message, param=name, code="unsupported_field")
        case _ if not name:
            raise ApiError(400, "the body must be a JSON object", code="json_invalid")
        case _:
            # A field with a description is said to be wrong as a whole.
            hint = record.model_fields[str(path[0])].description
            param = name if hint is None else str(path[0])
            message = f"{param}: {hint or _lower(problem['msg'])}"
            raise ApiError(400, message, param=param, code="bad_value")


def _telling(problems: list[ErrorDetails]) -> ErrorDetails:
    """Of a field with several possible types, what is wrong with the one that was meant."""
    same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    others = [problem for problem in same_field if not problem["type"].endswith("_type")]
    return (others or same_field)[0]


def _path(problem: ErrorDetails) -> list[int | str]:
    """Names from the body's field inwards, without the types that were tried on the way."""
    first, *inner = problem["loc"] or [""]
    # The name of an unknown field is the caller's, and may look like that of a type.
    last = inner.pop() if inner and problem["type"] == "extra_forbidden" else None
    path = [first, *(part for part in inner if not _is_union_branch(part))]
    return path if last is None else [*path, last]


def _is_union_branch(part: object) -> bool:
    """Whether a part of a location names a type that was tried, such as list[int], not a field."""
    text = str(part)
    return isinstance(part, str) and (
        text in ("str", "int", "float", "bool", "none") or "[" in text or "-" in text
    )


def _unknown(record: type[BaseModel], name: str) -> str:
    known = [field.alias or key for key, field in record.model_fields.items()]
    near = [] if "." in name else difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see /openapi.json for the fields"
    return f"{name} is not a field of this request{hint}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
