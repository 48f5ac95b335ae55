"""Held-out prompts cannot be made by the training generator: a proof by reading prompts back.

`read` finds category and key from a prompt's text alone. It is a function of the prompt, and it
returns the key of every draft; so drafts of one prompt have one key, and a key has one split. Its
readers know the words of the prompts, not how the generator came by them.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from random import Random

import pytest

pytest.importorskip("num2words")
pytest.importorskip("babel")

from twotower.lab.corpus import knowledge, multilingual, refusal, sample, tools
from twotower.lab.corpus.code import FAMILIES, FunctionFamily
from twotower.lab.corpus.document import CITIES, HASHED_AS, NAMES, split_of
from twotower.lab.corpus.documents import DRAWS

LONG = ("long_context", "lookup")
# Whose keys they have.
TAUGHT_AS = {
    "lookup": "long_context",
    "answered": "tools",
    "math_with_tools": "math",
    "refusal_with_tools": "refusal",
}


def read_math(prompt: str) -> str:
    if bare := re.search(r"(\d+) ([-+*]) (\d+)[?.]", prompt):
        return _sum_key([(int(bare[1]), bare[2], int(bare[3]))])
    if price := re.search(r"buys (\d+) \w+ for (\d+) dollars each", prompt):
        count, each = int(price[1]), int(price[2])
        steps = [(each, "*", count)]
        if paid := re.search(r"pays with (\d+)", prompt):
            steps.append((int(paid[1]), "-", count * each))
        return _sum_key(steps)
    if boxes := re.search(r"has (\d+) (?:boxes|bags|packs) of (\d+)", prompt):
        count, size = int(boxes[1]), int(boxes[2])
        steps = [(size, "*", count)]
        if change := re.search(r"(buys|uses) (\d+) (?:more|of them)\.", prompt):
            steps.append((size * count, "+" if change[1] == "buys" else "-", int(change[2])))
        return _sum_key(steps)
    if pair := re.search(r"has (\d+) \w+\. \w+ has (\d+)(?: (fewer|more) than)?", prompt):
        first, second = int(pair[1]), int(pair[2])
        sign = "-" if pair[3] == "fewer" else "+"
        steps = [(first, sign, second)]
        if pair[3] and "together" in prompt:
            other = first + second if sign == "+" else first - second
            steps.append((first, "+", other))
        return _sum_key(steps)
    total = int(re.search(r"(?:has|There are) (\d+)", prompt)[1])
    steps = []
    changes = re.findall(r"(buys|finds|gets|gives|loses|sells) (\d+)", prompt) or [
        (words, amount)
        for amount, words in re.findall(r"(\d+) ((?:get|come|go|fly|are) \w+)", prompt)
    ]
    more = {"buys", "finds", "gets", "get on", "come in", "fly in", "are bought", "are put"}
    for words, amount in changes:
        sign = "+" if words in more else "-"
        steps.append((total, sign, int(amount)))
        total += int(amount) if sign == "+" else -int(amount)
    return _sum_key(steps)


def _sum_key(steps: list[tuple[int, str, int]]) -> str:
    ordered = [(a, sign, b) if sign == "-" or a <= b else (b, sign, a) for a, sign, b in steps]
    return ";".join(f"{left}{sign}{right}" for left, sign, right in ordered)


@lru_cache(maxsize=1)
def families_by_name() -> dict[str, FunctionFamily]:
    named = [(name, family) for family in FAMILIES for name in family.names.split()]
    assert len({name for name, _ in named}) == len(named)  # so a name tells its family
    return dict(named)


def _function_key(head: str, text: str, template: Callable[[FunctionFamily], str]) -> str:
    """The key of a function by its head and a text that its template wrote."""
    name, variables = re.fullmatch(r"def (\w+)\(([\w, ]+)\):", head).groups()
    family = families_by_name()[name]
    kinds = {"num": r"\d+", "small": r"\d", "letter": "[a-z]", "mark": '[^"]+', "tag": "[a-z]+"}
    values = family.constants.split() if family.constants != "-" else []
    pattern = re.escape(template(family))
    names = variables.split(", ")
    for letter, variable in (("v", names[0]), ("w", names[-1])):
        pattern = pattern.replace(rf"\{{{letter}\}}", variable)
    for letter, kind in zip("cd", values, strict=False):
        pattern = pattern.replace(rf"\{{{letter}\}}", f"(?P<{letter}>{kinds[kind]})", 1)
        pattern = pattern.replace(rf"\{{{letter}\}}", f"(?P={letter})")
    found = re.fullmatch(pattern, text)
    constants = [found[letter] for letter in "cd"[: len(values)]]
    return f"{family.names.split()[0]}({', '.join(constants) or variables})"


def read_code(prompt: str) -> str:
    comment, head = prompt.removeprefix("# ").split("\n")
    return _function_key(head, comment, lambda family: family.comment)


EDITS = {
    "rename_function": r"Rename the function to \w+\.",
    "rename_argument": r"Rename \w+ to \w+\.",
    "change_constant": r'Change (\d+|".+") to (\d+|".+")\.',
    "change_operator": r"Change [<>=!]+ to [<>=!]+\.",
    "change_arithmetic": r"Change [-+*] to [-+*]\.",
    "add_default": r"Give \w+ the default .+\.",
    "wrap_result": r"Wrap the result in \w+\(\)\.",
    "change_result": r"Return .+ instead of .+\.",
    "add_docstring": r'Add the docstring ".+"',
    "add_first_line": r"Add the first line .+",
    "add_argument": r"Add the argument .+\.",
    "annotate": r"Annotate \w+ as \w+\.",
}


def read_editing(prompt: str) -> str:
    first, head, *body, edited, end = prompt.removeprefix("Edit: ").split("\n")
    assert (edited, end) == ("Edited:", "")
    (kind,) = [kind for kind, form in EDITS.items() if re.fullmatch(form, first)]
    return f"{kind}: {first} " + _function_key(head, "\n".join(body), lambda family: family.body)


@lru_cache(maxsize=1)
def request_patterns() -> list[tuple[tools.ToolForm, re.Pattern[str]]]:
    shapes = {
        "date": r"\d{4}-\d\d-\d\d",
        "time": r"\d\d:\d\d",
        "email": rf"[a-z]+@(?:{'|'.join(map(re.escape, tools.CHOICES['domain']))})",
        **dict.fromkeys(tools.RANGES, r"\d+"),
        **{slot: "|".join(map(re.escape, words)) for slot, words in tools.CHOICES.items()},
    }
    found = []
    for tool in tools.TOOLS:
        for request in tool.requests:
            pattern = re.escape(request)
            for name, slot in tool.slots.items():
                pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{shapes[slot]})")
            found.append((tool, re.compile(pattern)))
    return found


def read_tools(prompt: str) -> str:
    request = _asked_with_tools(prompt)
    calls = set()
    for tool, pattern in request_patterns():
        if match := pattern.fullmatch(request):
            values = {
                name: int(match[name]) if slot in tools.RANGES else match[name]
                for name, slot in tool.slots.items()
            }
            calls.add(json.dumps({"name": tool.name, "arguments": values}))
    assert len(calls) < 2  # no request can be meant for two tools
    return calls.pop() if calls else request


def _asked_with_tools(prompt: str) -> str:
    """What is asked, without a call and its result."""
    return prompt.split("\nUser: ", 1)[1].split("\nCall:", 1)[0]


def read_notes(prompt: str) -> str:
    asked = re.search(r"\nQ: What is the code of the (.+)\?\nA:$", prompt)[1]
    (sentence,) = re.findall(rf"The code of the {asked} is \d+\.", prompt)
    return str(sentence)


def table_of(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """All prompts of a finite category; one with two keys would be a leak."""
    table: dict[str, str] = {}
    for prompt, key in pairs:
        assert table.setdefault(prompt, key) == key, prompt
    return table


@lru_cache(maxsize=1)
def knowledge_prompts() -> dict[str, str]:
    return table_of(
        [
            (frame.format(form.format(x=fact.subject)), f"{fact.kind}:{fact.subject}:{i}:{j}")
            for fact in knowledge.facts()
            for i, form in enumerate(knowledge.KINDS[fact.kind])
            for j, frame in enumerate(knowledge.FRAMES)
        ]
    )


@lru_cache(maxsize=1)
def refusal_prompts() -> dict[str, str]:
    actions = [
        (form.format(name=name, city=city), form)
        for topic in refusal.TOPICS
        for form in topic.actions
        for name in (NAMES if "{name}" in form else ("",))
        for city in (CITIES if "{city}" in form else ("",))
    ]
    return table_of(
        [
            (f"User: {frame.format(action)}\nAssistant:", f"{form}:{number}")
            for action, form in actions
            for number, frame in enumerate(refusal.FRAMES)
        ]
    )


@lru_cache(maxsize=1)
def multilingual_prompts() -> dict[str, str]:
    """Numbers in all forms; sentences with the name Ann in all forms."""
    pairs = []
    for code, language in multilingual.LANGUAGES.items():
        for number in range(multilingual.NUM_NUMBERS):
            word = multilingual.number_word(number, code)
            is_whole = number <= 20 or (number % 10 == 0 and number <= 100)
            for place, (form, _) in enumerate(multilingual.NUMBER_FORMS):
                key = f"{number}:{code}" + (f":{place}" if is_whole else "")
                pairs.append((form.format(x=number, l=language, w=word), key))
    for code in multilingual.FOREIGN:
        for verb in multilingual.VERBS:
            for noun in multilingual.NOUNS:
                for count in multilingual.COUNTS:
                    parts = {
                        "l": multilingual.LANGUAGES[code],
                        "e": multilingual.write_sentence("Ann", verb, count, noun, "en"),
                        "s": multilingual.write_sentence("Ann", verb, count, noun, code),
                    }
                    pairs += [
                        (form.format(**parts), f"{verb} {count} {noun}:{code}")
                        for form, _ in multilingual.SENTENCE_FORMS
                    ]
    return table_of(pairs)


def read_multilingual(prompt: str) -> str | None:
    if day := re.search(r"\b\d{4}-\d\d-\d\d\b", prompt):
        (code,) = [c for c, name in multilingual.LANGUAGES.items() if f" {name}" in prompt]
        return f"{day[0]}:{code}"
    of_ann = re.sub(rf": (?:{'|'.join(NAMES)}) ", ": Ann ", prompt, count=1)
    return multilingual_prompts().get(of_ann)


OPENINGS: dict[str, tuple[str, Callable[[str], str]]] = {
    "# ": ("code", read_code),
    "Edit: ": ("editing", read_editing),
    "Tools:\n": ("tools", read_tools),
    "Notes: ": ("long_context", read_notes),
    "User: ": ("refusal", lambda prompt: refusal_prompts()[prompt]),
}


def read(prompt: str) -> tuple[str, str]:
    """Category and key of a prompt, from its text alone."""
    if prompt.startswith("Tools:\n"):
        asked = _asked_with_tools(prompt)
        if (refused := f"User: {asked}\nAssistant:") in refusal_prompts():
            return "refusal", refusal_prompts()[refused]
        if re.search(r"\d", asked) and read_tools(prompt) == asked:
            return "math", read_math(f"Q: {asked}\nA:")
    for opening, (category, reader) in OPENINGS.items():
        if prompt.startswith(opening):
            return category, reader(prompt)
    if prompt in knowledge_prompts():
        return "knowledge", knowledge_prompts()[prompt]
    key = read_multilingual(prompt)
    return ("math", read_math(prompt)) if key is None else ("multilingual", key)


@pytest.mark.parametrize("name", list(DRAWS))
def test_a_prompt_tells_its_category_and_key(name: str) -> None:
    """Silent failure: one prompt with two keys, of which one is held out and one is trained on."""
    rng = Random(f"read {name}")
    category = TAUGHT_AS.get(name, name)
    for _ in range(60 if name in LONG else 1500):
        draft = DRAWS[name](rng)
        assert read(draft.prompt) == (category, draft.key), draft.prompt


@pytest.mark.parametrize("name", list(DRAWS))
def test_the_key_alone_decides_the_split(name: str) -> None:
    """Silent failure: a document of one split whose key belongs to the other."""
    rng = Random(f"split {name}")
    for split in ("train", "test"):
        for _ in range(4 if name in LONG else 40):
            document = sample(name, split, rng)
            category, key = read(document.prompt)
            assert split_of(category, key) == split and document.key == key


def test_lookup_and_long_context_share_their_keys() -> None:
    """Silent failure: a near note that teaches the fact that a far note asks for."""
    assert HASHED_AS["lookup"] == "long_context" and "long_context" not in HASHED_AS
    for number in range(1000, 1500):
        key = f"The code of the red box is {number}."
        assert split_of("lookup", key) == split_of("long_context", key)


def test_finite_categories_hold_out_enough() -> None:
    """Silent failure: fewer held-out prompts than an evaluation asks for by default."""
    for category, table in (("knowledge", knowledge_prompts()), ("refusal", refusal_prompts())):
        held_out = [prompt for prompt, key in table.items() if split_of(category, key) == "test"]
        assert len(held_out) >= 200 and len(held_out) < len(table) / 8
