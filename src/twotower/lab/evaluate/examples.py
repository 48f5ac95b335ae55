"""Items of a results record to read: where modes disagree, then where all are wrong."""

from collections.abc import Sequence
from html import escape

from twotower.lab.evaluate.plots import Record

SHOWN = {"modes disagree": 12, "wrong in every mode": 4, "right in every mode": 1}
PROMPT_CHARS = 1200


def write_examples(items: Sequence[Record]) -> list[str]:
    """Foldable lists of prompt, expected and written text by category; nothing without items."""
    if not items:
        return []
    parts = [
        "<h2>Examples</h2>",
        "<p>Prompt, expected answer and what each mode wrote; click to open. "
        "All items are in results.json.</p>",
    ]
    for category in dict.fromkeys(item["category"] for item in items):
        mine = [item for item in items if item["category"] == category]
        for kind, limit in SHOWN.items():
            chosen = [item for item in mine if kind_of(item) == kind]
            if chosen:
                parts.append(_fold(f"{category}: {kind}", chosen, len(mine), limit))
    return parts


def kind_of(item: Record) -> str:
    """Which of the kinds of `SHOWN` an item is."""
    right = {bool(output["correct"]) for output in item["outputs"].values()}
    if len(right) == 2:
        return "modes disagree"
    return "right in every mode" if True in right else "wrong in every mode"


def _fold(title: str, chosen: Sequence[Record], total: int, limit: int) -> str:
    cut = f", first {limit} shown" if len(chosen) > limit else ""
    summary = f"<summary>{escape(title)}: {len(chosen)} of {total} items{cut}</summary>"
    body = "\n".join(_example(item) for item in chosen[:limit])
    return f"<details>{summary}\n{body}</details>"


def _example(item: Record) -> str:
    prompt = item["prompt"]
    if len(prompt) > PROMPT_CHARS:
        prompt = "... " + prompt[-PROMPT_CHARS:]
    lines = [
        f"<h3>{escape(item['category'])} {item['index']}</h3>",
        f"<p>prompt</p><pre>{escape(prompt)}</pre>",
        f"<p>expected</p><pre>{escape(item['reference'])}</pre>",
    ]
    for mode, output in item["outputs"].items():
        kind = "right" if output["correct"] else "wrong"
        note = f"wrong: {output['reason']}" if output["reason"] else kind
        passes = f", {output['nfe']} NFE" if output["nfe"] else ""
        lines.append(f"<p>{escape(mode)} ({escape(note)}{passes})</p>")
        lines.append(f"<pre class='{kind}'>{escape(output['text'])}</pre>")
    return "\n".join(lines)
