"""What a caller is told when a request cannot be answered: one line, in OpenAI's shape."""

import re
from collections.abc import Mapping

from twotower.engine import Failed

_STATUS = {
    "memory": 413,
    "cancelled": 499,  # nobody reads it: the client has gone
    "deadline": 504,
    "stopped": 503,
    "internal": 500,
}


# Where nothing more precise is known.
_CODES = {400: "bad_value", 404: "no_such_path", 405: "no_such_method", 415: "content_type"}
_LONGEST = 500  # characters of a message
# What requests call the engine's fields.
_API_NAMES = {
    "grammar": "response_format",
    "ids": "prompt",
    "json_schema": "response_format",
    "tool_call": "tools",
    "max_new_tokens": "max_tokens",
}


class ApiError(Exception):
    """A refusal or a failure with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        line = " ".join(message.split())  # it may quote all that a caller sent
        self.message = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
        self.param = param and param[:100]
        self.code = code or _CODES.get(status, "internal")
        self.headers = dict(headers or {})

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same to a caller who knows some fields by other names."""
        field, dot, rest = (self.param or "").partition(".")
        if field in names:
            self.param = names[field] + dot + rest
            self.message = names[field] + self.message.removeprefix(field)
        return self

    def body(self) -> dict[str, object]:
        """The JSON that OpenAI's clients read."""
        error = {
            "message": self.message,
            "type": _type_of(self.status),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def _type_of(status: int) -> str:
    match status:
        case 401 | 403:
            return "authentication_error"
        case 429:
            return "rate_limit_error"
        case _ if status < 500:
            return "invalid_request_error"
        case _:
            return "server_error"


def bad_value(error: ValueError) -> ApiError:
    """The engine's refusal of a request; its messages begin with the name of the field."""
    message = str(error)
    found = re.match(r"(?:the )?(prompt|[a-z_]+(?=[=:[]))", message)
    if found is None:
        return ApiError(400, message)
    name = _API_NAMES.get(found[1], found[1])
    if message.startswith(found[1]):
        message = name + message[len(found[1]) :]
    return ApiError(400, message, param=name)


def from_failure(failed: Failed) -> ApiError:
    """The error of a row that the engine gave up."""
    if failed.kind == "invalid":
        return bad_value(ValueError(failed.message))
    # A deadline would pass again: OpenAI's client would otherwise repeat the request twice.
    headers = {"x-should-retry": "false"} if failed.kind == "deadline" else {}
    if failed.kind == "stopped":
        headers = {"Retry-After": "5"}
    return ApiError(_STATUS[failed.kind], failed.message, code=failed.kind, headers=headers)
