"""Numbers (num2words), dates (babel) and short sentences in several languages.

The key is the language with what is said in it, whatever the wording and the direction. Number
words that cannot be put together from others (the first twenty, the tens) add the template to the
key: they are held out in one form and learnt in the others.
"""

from datetime import date
from functools import lru_cache
from random import Random

from twotower.lab.corpus.document import NAMES, Draft, lines
from twotower.lab.corpus.knowledge import missing_library

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
FOREIGN = tuple(code for code in LANGUAGES if code != "en")
NUM_NUMBERS = 1000
# Each template's prompt and completion; {x} is the number, {w} the word.
NUMBER_FORMS = (
    ("{x} in {l}:", " {w}"),
    ("In {l}, {x} is", " {w}."),
    ("{l} for {x}:", " {w}"),
    ("Q: How do you write {x} in {l}?\nA:", " {w}"),
    ("Q: What is {x} in {l}?\nA:", " {x} in {l} is {w}."),
    ("{l} {w} in digits:", " {x}"),
    ("The {l} word {w} means", " {x}."),
)
REVERSED = (5, 6)  # indices of the forms that ask from the word back
DATE_FORMS = (
    ("{x} in {l}:", " {w}"),
    ("Q: How do you write the date {x} in {l}?\nA:", " {w}"),
    ("Write {x} in {l}.\n{l}:", " {w}"),
)
VERBS, NOUNS = (
    {english: tuple(others) for english, *others in map(str.split, lines("sentences", name))}
    for name in ("verbs", "nouns")
)
COUNTS = range(3, 21)  # no number here changes with the gender of its noun in any language
SENTENCE_FORMS = (
    ("Translate to {l}: {e}\n{l}:", " {s}"),
    ("English: {e}\n{l}:", " {s}"),
    ("{l}: {s}\nEnglish:", " {e}"),
)


@lru_cache(maxsize=len(LANGUAGES) * NUM_NUMBERS)
def number_word(number: int, language: str) -> str:
    """Return the cardinal `number` in words."""
    try:
        from num2words import num2words
    except ImportError:
        raise missing_library("num2words") from None
    return str(num2words(number, lang=language))


def write_date(day: date, language: str) -> str:
    """Return a date in words, as in "7 mars 2025"."""
    try:
        from babel.dates import format_date
    except ImportError:
        raise missing_library("babel") from None
    return str(format_date(day, "long", locale=language))


def write_sentence(name: str, verb: str, count: int, noun: str, language: str) -> str:
    """Return "NAME VERB COUNT NOUN." in `language`; verb and noun are given in English."""
    if language != "en":
        place = FOREIGN.index(language)
        verb, noun = VERBS[verb][place], NOUNS[noun][place]
    return f"{name} {verb} {number_word(count, language)} {noun}."


def _draft(
    form: tuple[str, str], key: str, expected: str, kind: str, parts: dict[str, str]
) -> Draft:
    prompt, completion = form
    return Draft(
        key=key,
        prompt=prompt.format(**parts),
        completion=completion.format(**parts),
        answer=lambda: {"expected": expected, "language": parts["l"], "kind": kind},
    )


def _draw_number(rng: Random) -> Draft:
    form = rng.randrange(len(NUMBER_FORMS))
    language = rng.choice(tuple(LANGUAGES))
    number = rng.randrange(100) if rng.random() < 0.65 else rng.randrange(100, NUM_NUMBERS)
    atomic = number <= 20 or (number % 10 == 0 and number <= 100)
    parts = {"x": str(number), "l": LANGUAGES[language], "w": number_word(number, language)}
    key = f"{number}:{language}" + (f":{form}" if atomic else "")
    expected = parts["x"] if form in REVERSED else parts["w"]
    return _draft(NUMBER_FORMS[form], key, expected, "number", parts)


def _draw_date(rng: Random) -> Draft:
    language = rng.choice(tuple(LANGUAGES))
    day = date(rng.randint(2015, 2034), rng.randint(1, 12), rng.randint(1, 28))
    word = write_date(day, language)
    parts = {"x": day.isoformat(), "l": LANGUAGES[language], "w": word}
    return _draft(rng.choice(DATE_FORMS), f"{day}:{language}", word, "date", parts)


def _draw_sentence(rng: Random) -> Draft:
    language, form = rng.choice(FOREIGN), rng.choice(SENTENCE_FORMS)
    name, verb, noun = rng.choice(NAMES), rng.choice(tuple(VERBS)), rng.choice(tuple(NOUNS))
    count = rng.choice(COUNTS)
    parts = {
        "l": LANGUAGES[language],
        "e": write_sentence(name, verb, count, noun, "en"),
        "s": write_sentence(name, verb, count, noun, language),
    }
    expected = form[1].format(**parts).strip()
    return _draft(form, f"{verb} {count} {noun}:{language}", expected, "sentence", parts)


def draw(rng: Random) -> Draft:
    """Draw a number (below 100 twice as often as above), a date or a sentence to translate."""
    return rng.choice((_draw_number, _draw_number, _draw_date, _draw_sentence, _draw_sentence))(rng)
