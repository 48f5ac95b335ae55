"""A reply that calls a tool, as OpenAI writes it."""

import json
import secrets


def parse_call(text: str) -> dict[str, object] | None:
    """The call in a reply; None where it is text, or a call that was cut short."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
