"""Tokenizers of our own, learnt from texts."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from twotower.tokenizer.text import Tokenizer
from twotower.tokenizer.vocabulary import ROLES

MIN_VOCAB_SIZE = len(ROLES) + 256  # the special tokens and every byte


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learnt from `texts`; the same texts in the same order give the same tokenizer.

    The result has at most `vocab_size` tokens: fewer when the texts hold too few pairs to merge.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: {vocab_size} is too small; use at least {MIN_VOCAB_SIZE} (256 bytes and "
            "4 special tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(ROLES.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
