"""What /openapi.json says of the endpoints that write text."""

from collections.abc import Sequence
from typing import Any

from twotower.serve.api_fields import UNSERVED
from twotower.serve.schema import Record

_REFUSALS = {
    400: "A field is wrong; the message names it.",
    401: "No valid API key.",
    403: "This host name is not answered.",
    404: "No such model.",
    408: "The body took too long.",
    413: "Body or prompt are too large.",
    415: "The body is not declared as JSON.",
    429: "The queue is full or a limit of the caller is reached; see Retry-After.",
    500: "An internal error.",
    503: "The server is stopping.",
    504: "The deadline has passed.",
}


def body_of(record: type[Record]) -> dict[str, Any]:
    """The operation's request body: the record's JSON schema, its parts inlined."""
    schema = record.model_json_schema(ref_template="#/{model}")
    parts = schema.pop("$defs", {})
    for name in sorted(record.unserved):
        values = [None, *UNSERVED[name].neutral] if name in UNSERVED else None
        schema["properties"][name] = {"enum": values} if values else {}
    content = {"application/json": {"schema": _inlined(schema, parts)}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: object, parts: dict[str, object]) -> object:
    if isinstance(schema, list):
        return [_inlined(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        part = parts[schema["$ref"].removeprefix("#/")]
        assert isinstance(part, dict)
        return _inlined({**part, **rest}, parts)
    return {key: _inlined(value, parts) for key, value in schema.items()}


def answers_of(kind: str) -> dict[int | str, dict[str, Any]]:
    """The operation's answers: an object of the kind or its stream, and every refusal."""
    created, items = ("created_at", "output") if kind == "response" else ("created", "choices")
    whole = _object(
        ("id", "object", created, "model", items, "usage"),
        {
            "object": {"const": kind},
            items: {"type": "array", "items": {"type": "object"}},
            "usage": {"type": "object"},
        },
    )
    streamed = {"text/event-stream": {"schema": {"type": "string"}}}
    told = "The answer, or its stream of server-sent events."
    answers: dict[int | str, dict[str, Any]] = {
        200: {"description": told, "content": {"application/json": {"schema": whole}, **streamed}}
    }
    for status, description in _REFUSALS.items():
        text, maybe = {"type": "string"}, {"type": ["string", "null"]}
        parts = {"message": text, "type": text, "param": maybe, "code": maybe}
        error = {"error": _object([*parts], parts)}
        content = {"application/json": {"schema": _object(["error"], error)}}
        answers[status] = {"description": description, "content": content}
    return answers


def _object(required: Sequence[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [*required], "properties": properties}
