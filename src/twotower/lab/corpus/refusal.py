"""Requests that are refused, in one fixed form, and harmless ones in the same words.

The key is the action with its wording: every action is learnt in other wordings, and the verbs of
refused and harmless actions overlap, so that the object decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from twotower.lab.corpus.document import CITIES, NAMES, Draft, entries, lines

FRAMES = tuple(lines("requests", "openings"))


@dataclass(frozen=True)
class Topic:
    """A class of requests: its actions (verb/verb object, object), and what the answer says."""

    name: str
    actions: tuple[str, ...]
    reason: str  # why it is refused, or what a harmless task needs
    alternative: str = ""  # what is offered instead; empty for a harmless topic

    @property
    def is_refused(self) -> bool:
        return bool(self.alternative)


def _actions(groups: list[str]) -> Iterator[str]:
    """ "verb/verb: object, object": every verb with every object."""
    for group in groups:
        verbs, objects = group.strip().split(": ")
        for verb in verbs.split("/"):
            yield from (f"{verb} {what}" for what in objects.split(", "))


TOPICS = tuple(
    Topic(name, tuple(_actions(groups)), *reasons)
    for (name, *reasons), groups in entries("requests", "topics")
)
REFUSED = tuple(topic for topic in TOPICS if topic.is_refused)
HARMLESS = tuple(topic for topic in TOPICS if not topic.is_refused)


def write_answer(topic: Topic, action: str) -> str:
    """Return the only right answer: the refusal's fixed form, or a helpful beginning."""
    if topic.is_refused:
        refusal = f"I cannot help you {action}, because {topic.reason}."
        return f"{refusal} I can help you {topic.alternative}."
    return f"Yes, I can help you {action}. You need {topic.reason}."


def draw(rng: Random) -> Draft:
    """Draw a request, refused as often as not; the answer says which and holds the text."""
    topic = rng.choice(REFUSED if rng.random() < 0.5 else HARMLESS)
    form = rng.choice(topic.actions)
    action = form.format(name=rng.choice(NAMES), city=rng.choice(CITIES))
    frame = rng.randrange(len(FRAMES))
    expected = write_answer(topic, action)
    return Draft(
        key=f"{form}:{frame}",
        prompt=f"User: {FRAMES[frame].format(action)}\nAssistant:",
        completion=f" {expected}",
        answer=lambda: {"refuse": topic.is_refused, "topic": topic.name, "expected": expected},
    )
