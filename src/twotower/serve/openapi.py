"""What /openapi.json says of the endpoints that write text."""

import json
from typing import Any

from twotower.serve.api_fields import UNSERVED
from twotower.serve.schema import Record

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
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
    whole = {
        "type": "object",
        "required": ["id", "object", created, "model", items, "usage"],
        "properties": {
            "object": {"const": kind},
            items: {"type": "array", "items": {"type": "object"}},
            "usage": {"type": "object"},
        },
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The answer, or its stream of server-sent events.",
            "content": {
                "application/json": {"schema": whole},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        }
    }
    for status, description in _REFUSALS.items():
        content = {"application/json": {"schema": json.loads(json.dumps(_ERROR))}}
        answers[status] = {"description": description, "content": content}
    return answers
