"""Checkpoint folders of tiny random models with their tokenizers."""

import json
from pathlib import Path

from tiny_models import fresh_model, tiny_model
from tiny_text import tiny_tokenizer
from twotower.checkpoint import save_two_towers
from twotower.tokenizer import train_tokenizer

TEXT = "The old clock stopped at 12:45. Nobody noticed the silence; the whole house slept on."


def make_checkpoint(folder: Path, **generation_defaults: object) -> Path:
    """Write one; its generation_config.json holds the trained block size and what is given."""
    defaults = {"block_size": tiny_model().config.block_size} | generation_defaults
    files = {"generation_config.json": json.dumps(defaults).encode()} | tiny_tokenizer().files()
    save_two_towers(tiny_model(), folder, extra_files=files)
    return folder


def make_text_checkpoint(folder: Path) -> Path:
    """Write one with a byte-level BPE learnt from TEXT, so that any text has tokens of its own."""
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=300)
    save_two_towers(
        fresh_model(vocab_size=tokenizer.vocab_size), folder, extra_files=tokenizer.files()
    )
    return folder
