"""What the clients of a server ask in several modules of tests."""

from typing import Any, Literal

import httpx
from pydantic import BaseModel

from serving import Running
from twotower.serve.responses import ResponsesRequest
from twotower.serve.schema import ChatRequest, CompletionRequest, Record

ORDER = "7 times salad for Irene, please."
SUM = "Q: How much is 48 - 44?\nA:"
SPANISH = "What is 77 in Spanish?"
NUMBER = "77 in Spanish is setenta y siete."
ASK: list[Any] = [{"role": "user", "content": SPANISH}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "dish": {"type": "string"},
        "count": {"type": "integer"},
        "name": {"type": "string"},
    },
    "required": ["dish", "count", "name"],
}
TOOL: Any = {"type": "function", "function": {"name": "order_food", "parameters": PARAMETERS}}
ARGUMENTS = {"dish": "salad", "count": 7, "name": "Irene"}
BODIES: dict[str, tuple[type[Record], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "a", "max_tokens": 1}),
    "/v1/chat/completions": (ChatRequest, {"messages": ASK, "max_tokens": 1}),
    "/v1/responses": (ResponsesRequest, {"input": "a", "max_output_tokens": 1}),
}


class City(BaseModel):
    city: Literal["Paris", "Rome"]


def post(server: Running, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)
