"""Tables of countries, currencies and languages, read from babel's CLDR data.

Only the choice of entries is ours: well-known countries and languages, few enough for a model of
three million parameters to learn by heart.
"""

from dataclasses import dataclass
from functools import lru_cache

from twotower.lab.corpus.vocabulary import word_list

COUNTRIES = word_list(
    "AR AT AU BE BR CA CL CN CO CU CZ DE DK EG ES FI FR GB GR HR HU ID IE IN IQ IR IS IT JP KE "
    "KR LB LY MA MN MX MY NG NL NO NP NZ PE PH PK PL PT RO RS RU SA SE SI SK SN SY TH TN TR TZ UA "
    "US UY VE VN YE ZM"
)
WITH_ARTICLE = ("GB", "NL", "PH", "US")
# CLDR's list of official languages is partial or disputed for these, so no fact is made of them.
UNCERTAIN_LANGUAGES = ("AU", "IN", "MX", "NO", "NZ", "PE", "PH", "TN", "US", "NG", "IQ")
LANGUAGES = word_list(
    "af sq ar hy az eu be bg ca zh hr cs da nl en et fi fr ka de el he hi hu is id ga it ja ko la "
    "lv lt mk mt mn ne no fa pl pt ro ru sr sk sl so es sw sv th tr uk ur vi cy zu"
)


class MissingDataError(ImportError):
    """A library whose data the corpus is made from is not installed."""


def missing_library(name: str) -> MissingDataError:
    """Return the one-line error that says how to install the data libraries."""
    return MissingDataError(f'{name} is not installed: pip install "twotower[data]"')


@dataclass(frozen=True)
class Country:
    """A country in English: `name` bare, `phrase` with its article, languages may be empty."""

    code: str
    name: str
    phrase: str
    currency_code: str
    languages: tuple[str, ...]


@lru_cache(maxsize=1)
def countries() -> tuple[Country, ...]:
    """Return the chosen countries; currency_code is empty where babel lists none or several."""
    try:
        from babel import Locale
        from babel.languages import get_official_languages
        from babel.numbers import get_territory_currencies
    except ImportError:
        raise missing_library("babel") from None
    english = Locale("en")
    rows = []
    for code in COUNTRIES:
        name = english.territories[code]
        currencies = get_territory_currencies(code)
        official = [tag.split("_")[0] for tag in get_official_languages(code)]
        known = code not in UNCERTAIN_LANGUAGES and len(official) <= 3
        spoken = tuple(dict.fromkeys(english.languages[tag] for tag in official)) if known else ()
        phrase = f"the {name}" if code in WITH_ARTICLE else name
        currency = currencies[0] if len(currencies) == 1 else ""
        rows.append(Country(code, name, phrase, currency, spoken))
    return tuple(rows)


@lru_cache(maxsize=1)
def currency_names() -> dict[str, str]:
    """Return the English name of every currency of the chosen countries, as in "Japanese yen"."""
    from babel.numbers import get_currency_name

    codes = [country.currency_code for country in countries() if country.currency_code]
    return {code: get_currency_name(code, count=1, locale="en") for code in dict.fromkeys(codes)}


@lru_cache(maxsize=1)
def currency_symbols() -> dict[str, str]:
    """Return the symbols that differ from the currency's code."""
    from babel.numbers import get_currency_symbol

    symbols = {code: get_currency_symbol(code, locale="en") for code in currency_names()}
    return {code: symbol for code, symbol in symbols.items() if symbol != code}


@lru_cache(maxsize=1)
def language_names() -> dict[str, str]:
    """Return the English names of the chosen languages by their code."""
    try:
        from babel import Locale
    except ImportError:
        raise missing_library("babel") from None
    return {code: Locale("en").languages[code] for code in LANGUAGES}
