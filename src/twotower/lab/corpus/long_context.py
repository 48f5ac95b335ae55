"""Notes with one fact that the question needs, far back; the rest is other facts and small talk.

`draw` puts the fact 24 to 400 sentences before the question, about 256 to 4,096 tokens;
`draw_lookup`, for training alone, at most 24. The key is the fact with its value.
"""

import math
from random import Random

from twotower.lab.corpus.document import CITIES, MEN, NAMES, THINGS, Draft, words

COLORS = words("words", "colors")
HOLDERS = words("words", "holders")
NEAR, FAR = 24, 400  # sentences between the fact and the question
FACT = "The code of the {} is {}."
NUM_OTHER_FACTS = 4


def _small_talk(rng: Random) -> str:
    name = rng.choice(NAMES)
    likes = f"{name} likes {'his' if name in MEN else 'her'}"
    return rng.choice(
        (
            f"{name} has {rng.randint(2, 99)} {rng.choice(THINGS)}.",
            f"{name} is in {rng.choice(CITIES)}.",
            f"{name} goes to {rng.choice(CITIES)}.",
            f"{likes} {rng.choice(COLORS)} {rng.choice(THINGS)}.",
        )
    )


def _code(rng: Random) -> str:
    return str(rng.randint(1000, 9999))


def _draw(rng: Random, distance: int) -> Draft:
    """A document whose fact stands `distance` sentences before the question."""
    subjects = [f"{color} {holder}" for color in COLORS for holder in HOLDERS]
    asked, *others = rng.sample(subjects, 1 + NUM_OTHER_FACTS)
    value = _code(rng)
    sentence = FACT.format(asked, value)
    sentences = [_small_talk(rng) for _ in range(distance + rng.randint(0, 8))]
    for subject in others:
        sentences[rng.randrange(len(sentences))] = FACT.format(subject, _code(rng))
    sentences.insert(len(sentences) - distance, sentence)
    return Draft(
        key=sentence,
        prompt=f"Notes: {' '.join(sentences)}\nQ: What is the code of the {asked}?\nA:",
        completion=f" {sentence}",
        answer=lambda: {"expected": value, "sentence": sentence, "distance": distance},
    )


def draw(rng: Random) -> Draft:
    """Draw a far fact, its distance log-uniform; the answer holds value, sentence, distance."""
    return _draw(rng, round(math.exp(rng.uniform(math.log(NEAR), math.log(FAR)))))


def draw_lookup(rng: Random) -> Draft:
    """Draw a near fact: at most `NEAR` sentences back, short ones as often as long ones."""
    return _draw(rng, round(math.exp(rng.uniform(math.log(2), math.log(NEAR)))))
