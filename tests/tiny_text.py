"""A tokenizer for tiny models: 41 tokens of one to three letters, so that stops cut tokens."""

import functools
import itertools

import tokenizers
from tokenizers import decoders, models

from twotower import Tokenizer
from twotower.tokenizer import train_tokenizer

_SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>"]
_LETTERS = ["a", "b", "c", *("".join(p) for p in itertools.product("abc", repeat=2))]
WORDS = [*_SPECIAL, *_LETTERS, *("".join(p) for p in itertools.product("abc", repeat=3))][:41]


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """Ids 0..40: the special tokens, then a, b, c, aa, ab, ..., then three letters each."""
    vocabulary = {word: token for token, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.add_special_tokens(_SPECIAL)
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Byte-level, 320 ids: every byte and some longer tokens of JSON and English."""
    texts = ['{"name": "get", "arguments": {"city": "Oslo", "days": 12}}', "the secret is here: "]
    return train_tokenizer(texts, vocab_size=320)


def ids_of(*words: str) -> list[int]:
    """Token ids by their text."""
    return [WORDS.index(word) for word in words]
