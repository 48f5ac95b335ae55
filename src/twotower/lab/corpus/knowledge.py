"""Short factual English from babel: currencies, official languages, symbols and codes.

The key is the fact with its question form, so that every fact held out in one form is learnt in
the others.
"""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from twotower.lab.corpus.document import Draft, entries, words

FRAMES = ("Q: {}\nA:", "Question: {}\nAnswer:", "{}\n=>")
_KINDS = entries("facts", "kinds")
# Questions about {x} by kind of fact; the answer is one sentence with {y}.
KINDS = {kind: tuple(line.strip() for line in questions) for (kind, _), questions in _KINDS}
SENTENCES = {kind: sentence for (kind, sentence), _ in _KINDS}
# Well-known countries and languages, few enough for a model of three million parameters to learn by
# heart; only the choice is ours.
COUNTRIES, LANGUAGES = words("facts", "countries"), words("facts", "languages")
WITH_ARTICLE = ("GB", "NL", "PH", "US")
# CLDR's list of official languages is partial or disputed for these, so no fact is made of them.
UNCERTAIN_LANGUAGES = ("AU", "IN", "MX", "NO", "NZ", "PE", "PH", "TN", "US", "NG", "IQ")


class MissingDataError(ImportError):
    """A library whose data the corpus is made from is not installed."""


def missing_library(name: str) -> MissingDataError:
    """Return the one-line error that says how to install the data libraries."""
    return MissingDataError(f'{name} is not installed: pip install ".[data]"')


@dataclass(frozen=True)
class Fact:
    """A thing that is asked about and its value."""

    kind: str
    subject: str
    value: str


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """Return every fact, in a fixed order; none of a currency where babel lists none or several."""
    try:
        from babel import Locale
        from babel.languages import get_official_languages
        from babel.numbers import get_currency_name, get_currency_symbol, get_territory_currencies
    except ImportError:
        raise missing_library("babel") from None
    english = Locale("en")
    languages = {code: english.languages[code] for code in LANGUAGES}
    found = {country: get_territory_currencies(country) for country in COUNTRIES}
    currency_of = {country: codes[0] for country, codes in found.items() if len(codes) == 1}
    currencies = {
        code: get_currency_name(code, count=1, locale="en") for code in currency_of.values()
    }
    symbols = {code: get_currency_symbol(code, locale="en") for code in currencies}
    rows = [Fact("symbol", currencies[code], s) for code, s in symbols.items() if s != code]
    rows += [Fact("currency_code", name, code) for code, name in currencies.items()]
    rows += [Fact("language_code", name, code) for code, name in languages.items()]
    rows += [Fact("code_language", code, name) for code, name in languages.items()]
    for code in COUNTRIES:
        name = english.territories[code]
        phrase = f"the {name}" if code in WITH_ARTICLE else name
        if code in currency_of:
            rows.append(Fact("currency", phrase, f"the {currencies[currency_of[code]]}"))
        official = [tag.split("_")[0] for tag in get_official_languages(code)]
        if official and code not in UNCERTAIN_LANGUAGES and len(official) <= 3:
            *others, last = dict.fromkeys(english.languages[tag] for tag in official)
            spoken = f"{', '.join(others)} and {last}" if others else last
            rows.append(Fact("languages", phrase, spoken))
        rows.append(Fact("country_code", phrase, code))
        rows.append(Fact("code_country", code, phrase))
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
    return Draft(
        key=f"{fact.kind}:{fact.subject}:{form}:{frame}",
        prompt=FRAMES[frame].format(question),
        completion=f" {sentence}",
        answer=lambda: {"expected": fact.value, "sentence": sentence, "kind": fact.kind},
    )
