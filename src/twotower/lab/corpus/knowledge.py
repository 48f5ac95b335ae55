"""Short factual English from babel: currencies, official languages, symbols and codes.

The key is the fact with its question form, so that every fact held out in one form is learnt in
the others.
"""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from twotower.lab.corpus.document import Draft
from twotower.lab.corpus.territories import (
    countries,
    currency_names,
    currency_symbols,
    language_names,
)

FRAMES = ("Q: {}\nA:", "Question: {}\nAnswer:", "{}\n=>")
# Questions about {x} by kind of fact; the answer is one sentence with {y}.
KINDS = {
    "currency": (
        "What is the currency of {x}?",
        "Which currency is used in {x}?",
        "What money do people use in {x}?",
        "Name the currency of {x}.",
        "How do people pay in {x}?",
    ),
    "languages": (
        "What is the official language of {x}?",
        "Which language is official in {x}?",
        "Name the official language of {x}.",
        "What do people officially speak in {x}?",
    ),
    "country_code": (
        "What is the country code of {x}?",
        "Which two letters stand for {x}?",
        "Give the code of {x}.",
        "How is {x} abbreviated?",
    ),
    "code_country": (
        "Which country has the code {x}?",
        "What country is {x}?",
        "Name the country with the code {x}.",
    ),
    "currency_code": (
        "What is the code of the {x}?",
        "Which three letters stand for the {x}?",
        "How is the {x} abbreviated?",
    ),
    "symbol": (
        "What is the symbol of the {x}?",
        "Which sign is used for the {x}?",
        "How do you write the {x} as a sign?",
    ),
    "language_code": (
        "What is the language code of {x}?",
        "Which two letters mean {x}?",
        "Give the language code of {x}.",
    ),
    "code_language": (
        "Which language has the code {x}?",
        "What does the language code {x} mean?",
        "Name the language with the code {x}.",
    ),
}
SENTENCES = {
    "currency": "The currency of {x} is {y}.",
    "languages": "The official language of {x} is {y}.",
    "country_code": "The country code of {x} is {y}.",
    "code_country": "{x} is the code of {y}.",
    "currency_code": "The code of the {x} is {y}.",
    "symbol": "The symbol of the {x} is {y}.",
    "language_code": "The language code of {x} is {y}.",
    "code_language": "The language code {x} means {y}.",
}


@dataclass(frozen=True)
class Fact:
    """A thing that is asked about and its value."""

    kind: str
    subject: str
    value: str


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """Return every fact, in a fixed order."""
    names, languages = currency_names(), language_names()
    rows = [Fact("symbol", names[code], symbol) for code, symbol in currency_symbols().items()]
    rows += [Fact("currency_code", name, code) for code, name in names.items()]
    rows += [Fact("language_code", name, code) for code, name in languages.items()]
    rows += [Fact("code_language", code, name) for code, name in languages.items()]
    for country in countries():
        if country.currency_code:
            rows.append(Fact("currency", country.phrase, f"the {names[country.currency_code]}"))
        if country.languages:
            *others, last = country.languages
            spoken = f"{', '.join(others)} and {last}" if others else last
            rows.append(Fact("languages", country.phrase, spoken))
        rows.append(Fact("country_code", country.phrase, country.code))
        rows.append(Fact("code_country", country.code, country.phrase))
    return tuple(rows)


def write_sentence(fact: Fact) -> str:
    """Return the fact as one sentence; several official languages make it plural."""
    sentence = SENTENCES[fact.kind].format(x=fact.subject, y=fact.value)
    if fact.kind == "languages" and " and " in fact.value:
        return sentence.replace("language of", "languages of").replace(" is ", " are ")
    return sentence


def draw(rng: Random) -> Draft:
    """Draw a fact and a question; the answer holds the value and the whole sentence."""
    fact = rng.choice(facts())
    frame = rng.randrange(len(FRAMES))
    form = rng.randrange(len(KINDS[fact.kind]))
    question = KINDS[fact.kind][form].format(x=fact.subject)
    sentence = write_sentence(fact)

    def answer() -> dict[str, object]:
        return {"expected": fact.value, "sentence": sentence, "kind": fact.kind}

    return Draft(
        key=f"{fact.kind}:{fact.subject}:{form}:{frame}",
        prompt=FRAMES[frame].format(question),
        completion=f" {sentence}",
        answer=answer,
    )
