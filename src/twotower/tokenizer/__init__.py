"""Text to token ids and back: the only importer of `tokenizers`."""

from twotower.tokenizer.decoding import TextStream
from twotower.tokenizer.file import load_fitting_tokenizer, load_tokenizer, read_chat_template
from twotower.tokenizer.text import Tokenizer
from twotower.tokenizer.training import MIN_VOCAB_SIZE, train_tokenizer
from twotower.tokenizer.vocabulary import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)

__all__ = [
    "CHAT_TEMPLATE_FILE",
    "MIN_VOCAB_SIZE",
    "TOKENIZER_CONFIG_FILE",
    "TOKENIZER_FILE",
    "TextStream",
    "Tokenizer",
    "load_fitting_tokenizer",
    "load_tokenizer",
    "read_chat_template",
    "train_tokenizer",
]
