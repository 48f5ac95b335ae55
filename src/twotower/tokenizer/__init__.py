"""Text to token ids and back: the only importer of `tokenizers`."""

from twotower.tokenizer.decoding import TextStream
from twotower.tokenizer.file import load_tokenizer
from twotower.tokenizer.text import (
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    train_tokenizer,
)

__all__ = [
    "MIN_VOCAB_SIZE",
    "SPECIAL_TOKENS",
    "TOKENIZER_CONFIG_FILE",
    "TOKENIZER_FILE",
    "TextStream",
    "Tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]
