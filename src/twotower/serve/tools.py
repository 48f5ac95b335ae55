"""A reply that calls tools, as OpenAI writes it."""

import secrets

from twotower.serve.tool_calls import ToolStyle, read_tool_calls

Calls = list[dict[str, object]]


def split_calls(text: str, style: ToolStyle | None) -> tuple[str, Calls]:
    """Text and calls of a reply; without a style there are no calls."""
    if style is None:
        return text, []
    taken = read_tool_calls(text, style)
    calls: Calls = [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in taken.calls
    ]
    return taken.content, calls
