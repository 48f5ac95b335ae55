"""Number words (num2words) and names of countries and languages (babel) in several languages.

The key is the language with the number, in both directions. Words that cannot be put together
from others (the first twenty, the tens, every name) add the template to the key: they are held
out in one form and learnt in the others.
"""

from functools import lru_cache
from random import Random

from twotower.corpus.document import Draft
from twotower.corpus.territories import missing_library, translated_names

LANGUAGES = {
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "nl": "Dutch",
    "sv": "Swedish",
    "en": "English",
}
NAME_LANGUAGES = tuple(code for code in LANGUAGES if code != "en")
NUM_NUMBERS = 1000
# Each template's prompt and completion; {x} is the number or English name, {w} the word.
NUMBER_FORMS = (
    ("{x} in {l}:", " {w}"),
    ("In {l}, {x} is", " {w}."),
    ("{l} for {x}:", " {w}"),
    ("Q: How do you write {x} in {l}?\nA:", " {w}"),
    ("Q: What is {x} in {l}?\nA:", " {x} in {l} is {w}."),
    ("{l} {w} in digits:", " {x}"),
    ("The {l} word {w} means", " {x}."),
)
NAME_FORMS = (
    ("{x} in {l}:", " {w}"),
    ("In {l}, {x} is", " {w}."),
    ("{l} for {x}:", " {w}"),
    ("Q: What is the {l} word for {x}?\nA:", " {w}"),
    ("Q: What is {x} in {l}?\nA:", " {x} in {l} is {w}."),
    ("{l} {w} in English:", " {x}"),
    ("The {l} word {w} means", " {x}."),
)
REVERSED = (5, 6)  # indices of the forms that ask from the word back


@lru_cache(maxsize=len(LANGUAGES) * NUM_NUMBERS)
def number_word(number: int, language: str) -> str:
    """Return the cardinal `number` in words."""
    try:
        from num2words import num2words
    except ImportError:
        raise missing_library("num2words") from None
    return str(num2words(number, lang=language))


@lru_cache(maxsize=len(LANGUAGES))
def _names(language: str) -> tuple[tuple[str, str], ...]:
    """Return (English, translated) names; a translated word that names two things is left out."""
    table = translated_names(language)
    words = list(table.values())
    return tuple((name, word) for name, word in table.items() if words.count(word) == 1)


def _draft(kind: str, form: int, given: str, language: str, word: str, by_form: bool) -> Draft:
    prompt, completion = (NUMBER_FORMS if kind == "number" else NAME_FORMS)[form]
    parts = {"x": given, "l": LANGUAGES[language], "w": word}
    expected = given if form in REVERSED else word

    def answer() -> dict[str, object]:
        return {"expected": expected, "language": language, "kind": kind}

    return Draft(
        key=f"{given}:{language}" + (f":{form}" if by_form else ""),
        prompt=prompt.format(**parts),
        completion=completion.format(**parts),
        answer=answer,
    )


def draw(rng: Random) -> Draft:
    """Draw a number (below 100 twice as often as above) or a name; answer holds the word."""
    form = rng.randrange(len(NUMBER_FORMS))
    if rng.random() < 0.6:
        language = rng.choice(tuple(LANGUAGES))
        number = rng.randrange(100) if rng.random() < 0.65 else rng.randrange(100, NUM_NUMBERS)
        atomic = number <= 20 or (number % 10 == 0 and number <= 100)
        word = number_word(number, language)
        return _draft("number", form, str(number), language, word, atomic)
    language = rng.choice(NAME_LANGUAGES)
    name, word = rng.choice(_names(language))
    return _draft("name", form, name, language, word, True)
