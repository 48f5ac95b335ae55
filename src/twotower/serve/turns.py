"""The messages of a chat request as its template wants them."""

import json

from twotower.serve.errors import ApiError
from twotower.serve.schema import ChatRequest, Message
from twotower.serve.served import Served


def encode_chat(body: ChatRequest, served: Served) -> list[int]:
    """Token ids of the prompt; ApiError 400 without a template or where it refuses."""
    if served.template is None:
        raise ApiError(
            400,
            f"model {served.name!r} has no chat template; use /v1/completions, or start the "
            "server with --chat-template FILE",
            code="no_chat_template",
        )
    if body.tools is not None and not served.template.has_tools:
        raise ApiError(400, "tools: the model's chat template has no place for them", param="tools")
    turns = [_turn(number, message) for number, message in enumerate(body.messages)]
    # A caller who forbids calls is answered as if there were no tools.
    tools = None if body.tools is None or body.tool_choice == "none" else body.tools
    tool_records = None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools]
    ids = served.template.encode(turns, tool_records, served.tokenizer)
    if not ids:
        raise ApiError(400, "messages: the chat template makes no text of them", param="messages")
    return ids


def _turn(number: int, message: Message) -> dict[str, object]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and not message.tool_calls:
        raise ApiError(400, f"messages.{number}.content: is missing; give text", param="messages")
    turn: dict[str, object] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(number, call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(number: int, text: str) -> object:
    try:
        arguments = json.loads(text)
        json.dumps(arguments, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return arguments
    except (ValueError, RecursionError):
        raise ApiError(
            400, f"messages.{number}.tool_calls: arguments are not JSON", param="messages"
        ) from None
