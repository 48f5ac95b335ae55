"""Tool calls: one JSON object that fits the tool's schema and holds the request's arguments."""

import json

from twotower.lab.corpus import Document
from twotower.lab.evaluate.suite.verdict import RIGHT, Verdict, wrong


def check(document: Document, text: str) -> Verdict:
    """Parse, validate against the schema, compare name and arguments with their types."""
    try:
        import jsonschema
    except ImportError:
        message = 'jsonschema is not installed: pip install "twotower[eval]"'
        raise ImportError(message) from None
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return wrong("not JSON")
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return wrong("not an object of name and arguments")
    if call["name"] != document.answer["name"]:
        return wrong(f"called {str(call['name'])[:40]}")
    schema = document.answer["schema"]
    assert isinstance(schema, dict)
    problem = next(jsonschema.Draft202012Validator(schema).iter_errors(call["arguments"]), None)
    if problem is not None:
        return wrong(f"schema: {problem.message[:80]}")
    wanted = json.dumps(document.answer["arguments"], sort_keys=True)
    is_equal = json.dumps(call["arguments"], sort_keys=True) == wanted
    return RIGHT if is_equal else wrong("other arguments")
