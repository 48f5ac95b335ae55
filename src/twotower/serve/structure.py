"""The grammar that a reply must keep: from response_format, or from tools and tool_choice."""

from twotower.engine import Grammar
from twotower.engine.grammar import json_schema
from twotower.serve.errors import ApiError, bad_value
from twotower.serve.fields import Decoding, ResponseFormat
from twotower.serve.schema import ChatRequest
from twotower.serve.served import Served
from twotower.serve.tool_calls import tool_call


def structure_of(body: Decoding, served: Served) -> Grammar | None:
    """None where any text will do. ApiError 400 for what no grammar can be made of."""
    try:
        chosen = _format(body.response_format)
        if not isinstance(body, ChatRequest) or (body.tools is None and body.tool_choice is None):
            return chosen
        calls = _calls(body, served)
    except ValueError as error:
        raise bad_value(error) from None
    if chosen is not None and calls is not None:
        raise ApiError(
            400, "response_format: leave it out, or tools; a reply keeps one form", param="tools"
        )
    return chosen or calls


def _format(wanted: ResponseFormat | None) -> Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return json_schema({"type": "object"})
    if wanted.json_schema is None:
        raise ApiError(
            400, "response_format: type json_schema needs json_schema", param="response_format"
        )
    return json_schema(wanted.json_schema.schema_)


def _calls(body: ChatRequest, served: Served) -> Grammar | None:
    if body.tools is None:
        raise ApiError(400, "tool_choice: needs tools", param="tool_choice")
    assert served.template is not None  # the prompt has been made
    choice = body.tool_choice or "auto"
    return tool_call(
        [tool.model_dump(exclude_none=True) for tool in body.tools],
        choice if isinstance(choice, str) else choice.model_dump(),
        served.template.tool_style,
        body.parallel_tool_calls is not False,
    )
