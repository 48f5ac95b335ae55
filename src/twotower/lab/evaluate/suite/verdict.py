"""What a checker says of an answer."""

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Right or wrong; `reason` names the first thing that is wrong, and is empty otherwise."""

    correct: bool
    reason: str = ""


RIGHT = Verdict(True)


def wrong(reason: str) -> Verdict:
    return Verdict(False, reason)


def normalise(text: str) -> str:
    """Composed characters and single spaces: what a reader cannot tell apart becomes equal."""
    return " ".join(unicodedata.normalize("NFC", text).split())
