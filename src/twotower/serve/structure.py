"""The grammar that a reply must follow: from response_format, or from tools and tool_choice."""

from twotower.engine.grammar import Grammar
from twotower.serve.errors import ApiError
from twotower.serve.fields import Decoding
from twotower.serve.schema import ChatRequest


def structure_of(body: Decoding) -> Grammar | None:
    """None where any text will do."""
    wants_format = body.response_format is not None and body.response_format.type != "text"
    wants_tools = isinstance(body, ChatRequest) and body.tools is not None
    if wants_format or wants_tools:
        raise ApiError(400, "response_format and tools are not ready", code="not_ready")
    return None
