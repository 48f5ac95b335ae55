"""Write the tables of the API's fields into docs/serving.md, from the records of bodies.

Usage: python scripts/field_table.py
"""

import json

from page_table import PageTable

from twotower.serve.api_fields import UNSERVED, WITHOUT_EFFECT
from twotower.serve.responses import ResponsesRequest, TextOptions
from twotower.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Decoding,
    Record,
    StreamOptions,
    TextRequest,
)

OURS = "mode"  # the first of our own in `Decoding`
ENDPOINTS: dict[str, type[Record]] = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "responses": ResponsesRequest,
}
PARTS: dict[str, type[Record]] = {"stream_options": StreamOptions, "text": TextOptions}


def _names(record: type[Record], without: type[Record] | None = None) -> list[str]:
    left_out = set(without.model_fields) if without else set()
    return [name for name in record.model_fields if name not in left_out]


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table() -> str:
    """What is used, what is accepted without effect, and what is refused."""
    common = _names(Decoding)
    place = common.index(OURS)
    every = [record.unserved for record in ENDPOINTS.values()]
    rows = [
        ("all", common[:place]),
        ("all, our own", common[place:]),
        ("completions and chat", _names(TextRequest, Decoding)),
        ("completions", _names(CompletionRequest, TextRequest)),
        ("chat", _names(ChatRequest, TextRequest)),
        ("responses", _names(ResponsesRequest, Decoding)),
        ("accepted, without effect", sorted(WITHOUT_EFFECT & frozenset().union(*every))),
    ]
    lines = ["| of | fields |", "|---|---|", *(f"| {who} | {_listed(own)} |" for who, own in rows)]
    lines += [
        "",
        "| accepted if null, false, 0 or empty | also with | otherwise refused, because |",
    ]
    lines += ["|---|---|---|"]
    holders = {**ENDPOINTS, **PARTS}
    for name in sorted(UNSERVED):
        of = [holder for holder, record in holders.items() if name in record.unserved]
        also = ", ".join(f"`{json.dumps(value)}`" for value in UNSERVED[name].neutral)
        lines.append(f"| `{name}` ({', '.join(of)}) | {also} | {UNSERVED[name].reason} |")
    return "\n".join(lines) + "\n"


TABLE = PageTable("serving.md", "fields", "field_table.py", table)

if __name__ == "__main__":
    TABLE.write()
