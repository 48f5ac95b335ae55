"""Fields of OpenAI's API that this server does not act on, by its published list of fields.

Two kinds: what says something of the caller or hints at speed, and changes no answer, is taken with
any value; what asks for something that cannot be had is taken with values that ask for nothing and
otherwise refused with a sentence. `tests/e2e/test_serve_openai.py` compares these tables and the
records of bodies with the types of the package `openai`.
"""

from collections.abc import Mapping
from typing import NamedTuple

WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)


class Unserved(NamedTuple):
    """A field: why it is refused, and the values beside null and empty ones that ask for nothing.
    parts: such values of the fields of an object. asks_by_itself: an object without fields asks
    for it, too.
    """

    reason: str
    neutral: tuple[object, ...] = ()
    parts: tuple[object, ...] = ()
    asks_by_itself: bool = False


_TEXT = "this model writes text only"
_KEPT = "nothing is kept between requests; send the whole conversation"
_REASONING = "this model does not reason apart from its answer"
UNSERVED: Mapping[str, Unserved] = {
    "access_programs": Unserved("there are no access programs here"),
    "audio": Unserved(_TEXT),
    "background": Unserved("answers are not worked on in the background; stream them"),
    "background_options": Unserved("answers are not worked on in the background; stream them"),
    "best_of": Unserved("texts are not ranked; ask for all of them with n", (1,)),
    "context_management": Unserved("nothing is taken out of a prompt; send a shorter one"),
    "conversation": Unserved(_KEPT),
    "function_call": Unserved("use tools and tool_choice, which replace it", ("none", "auto")),
    "functions": Unserved("use tools, which replace it"),
    "image": Unserved(_TEXT),
    "include": Unserved(
        "nothing more can be included in an answer", (["reasoning.encrypted_content"],)
    ),
    "include_obfuscation": Unserved("chunks are not padded"),
    "max_tool_calls": Unserved("this server calls no tools by itself"),
    "modalities": Unserved(_TEXT, (["text"],)),
    "moderation": Unserved("texts are not moderated here"),
    "previous_response_id": Unserved(_KEPT),
    "prompt": Unserved("there are no stored prompts here; use instructions"),
    "reasoning": Unserved(_REASONING, ("none", "auto"), parts=("none", "auto")),
    "reasoning_effort": Unserved(_REASONING, ("none",)),
    "service_tier": Unserved("there is one tier", ("auto", "default")),
    "store": Unserved("nothing is kept after an answer"),
    "suffix": Unserved("this model continues a text and cannot write into one"),
    "top_logprobs": Unserved("log-probabilities are to be had from /v1/chat/completions"),
    "truncation": Unserved("nothing is taken out of a prompt; send a shorter one", ("disabled",)),
    "verbosity": Unserved("the length of an answer cannot be chosen; use max_tokens", ("medium",)),
    "web_search_options": Unserved(
        "nothing is searched here; give a function as a tool", asks_by_itself=True
    ),
}


def asks_for_nothing(name: str, value: object) -> bool:
    """Whether a field of UNSERVED can be taken with this value."""
    field = UNSERVED[name]
    if isinstance(value, dict):
        return not field.asks_by_itself and all(
            _is_empty(part, field.parts) for part in value.values()
        )
    return _is_empty(value, field.neutral)


def _is_empty(value: object, neutral: tuple[object, ...]) -> bool:
    if isinstance(value, dict):
        return all(_is_empty(part, neutral) for part in value.values())
    known = (None, False, 0, "", *neutral)
    return value == [] or any(type(value) is type(one) and value == one for one in known)
