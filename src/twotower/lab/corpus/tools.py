"""Tool calls: compact signatures and a request; the completion is one JSON object.

The key is the called tool and its arguments, without the wording and the other tools shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from twotower.lab.corpus.document import CITIES, NAMES, Draft, entries, word_list

CHOICES = {
    "city": CITIES,
    "person": NAMES,
    "room": ("kitchen", "bedroom", "office", "hall", "garage", "bathroom"),
    "color": ("red", "blue", "green", "white", "yellow", "orange", "pink"),
    "unit": ("celsius", "fahrenheit"),
    "travel": ("car", "bus", "train", "bike"),
    "currency": ("EUR", "USD", "GBP", "JPY", "CHF", "SEK", "PLN", "INR", "CAD", "BRL"),
    "language": ("French", "German", "Spanish", "Italian", "Dutch", "Polish", "Swedish"),
    "phrase": tuple(
        f"{first} {second}"
        for first in ("good", "my", "the old", "a new", "our", "one big")
        for second in word_list("morning friend house car book dog garden train city day")
    ),
    "title": tuple(
        f"{first} {second}"
        for first in word_list("team budget school family project sales music health")
        for second in word_list("meeting call lunch review party lesson check trip")
    ),
    "product": tuple(
        f"{first} {second}"
        for first in word_list("red blue small large cheap black warm light")
        for second in word_list("shoes lamp table jacket phone bag chair watch")
    ),
    "dish": word_list("pizza soup salad pasta rice curry burger sushi tacos cake"),
    "genre": word_list("jazz rock pop blues folk soul techno opera"),
    "stock": word_list("AAPL MSFT NVDA AMZN TSLA IBM INTC AMD ORCL SAP"),
    "domain": word_list("mail.com post.org home.net work.com"),
}
RANGES = {
    "days": (2, 14),
    "amount": (2, 999),
    "minutes": (2, 90),
    "degrees": (15, 28),
    "count": (2, 12),
    "price": (10, 500),
    "number": (2, 999),
}


@dataclass(frozen=True)
class ToolForm:
    """A tool: its parameters with the slot that fills each, and ways to ask for it."""

    name: str
    slots: dict[str, str]
    requests: tuple[str, ...]


def _slots(text: str) -> dict[str, str]:
    """ "from=city days": a parameter is filled by the slot of its name, or by another one."""
    pairs = [slot.split("=") for slot in text.split()]
    return {pair[0]: pair[-1] for pair in pairs}


TOOLS = tuple(
    ToolForm(name, _slots(slots), tuple(line.strip() for line in requests))
    for (name, slots), requests in entries("tools", "calls")
)


def draw_value(slot: str, rng: Random) -> str | int:
    """Draw a value for a slot: a listed word, a number, a date, a time or an address."""
    if slot in CHOICES:
        return rng.choice(CHOICES[slot])
    if slot in RANGES:
        return rng.randint(*RANGES[slot])
    if slot == "date":
        return f"2025-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    if slot == "time":
        return f"{rng.randint(6, 22):02}:{rng.randrange(0, 60, 5):02}"
    assert slot == "email"
    return f"{rng.choice(NAMES).lower()}@{rng.choice(CHOICES['domain'])}"


def _property(slot: str) -> dict[str, object]:
    if slot in ("unit", "travel"):
        return {"type": "string", "enum": list(CHOICES[slot])}
    return {"type": "integer" if slot in RANGES else "string"}


def write_signature(tool: ToolForm) -> str:
    """Return the compact form shown in the prompt, as in "get_time(city: string)"."""
    parts = []
    for name, slot in tool.slots.items():
        kind = _property(slot)
        values = kind.get("enum")
        shown = "|".join(CHOICES[slot]) if values else kind["type"]
        parts.append(f"{name}: {shown}")
    return f"{tool.name}({', '.join(parts)})"


def schema_of(tool: ToolForm) -> dict[str, object]:
    """Return the JSON schema (draft 2020-12) of the tool's arguments."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {name: _property(slot) for name, slot in tool.slots.items()},
        "required": list(tool.slots),
        "additionalProperties": False,
    }


SIGNATURES = {tool.name: write_signature(tool) for tool in TOOLS}


def draw_arguments(tool: ToolForm, rng: Random) -> dict[str, str | int]:
    """Draw the arguments, all different, so that swapped arguments are a visible mistake."""
    while True:
        values = {name: draw_value(slot, rng) for name, slot in tool.slots.items()}
        if len(set(values.values())) == len(values):
            return values


def write_prompt(signatures: Sequence[str], asked: str) -> str:
    """Return the prompt of a next reply, which may be a call; what is asked ends it."""
    return "\n".join(("Tools:", *signatures, f"User: {asked}", "Call:"))


def draw(rng: Random) -> Draft:
    """Draw a request among one to three tools; the answer holds name, arguments and schema."""
    shown = rng.sample(TOOLS, rng.choice((1, 2, 2, 3)))
    tool = shown[0]
    arguments = draw_arguments(tool, rng)
    rng.shuffle(shown)
    call = json.dumps({"name": tool.name, "arguments": arguments})
    request = rng.choice(tool.requests).format(**arguments)
    return Draft(
        key=call,
        prompt=write_prompt([SIGNATURES[option.name] for option in shown], request),
        completion=f" {call}",
        answer=lambda: {"name": tool.name, "arguments": arguments, "schema": schema_of(tool)},
    )
