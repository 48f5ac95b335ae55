"""A checkpoint folder of a tiny random model with its tokenizer."""

import json
from pathlib import Path

from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from twotower.checkpoint import save_model


def make_checkpoint(folder: Path, **generation_defaults: object) -> Path:
    """Write one; its generation_config.json holds the trained block size and what is given."""
    defaults = {"block_size": tiny_model().config.block_size} | generation_defaults
    files = {"generation_config.json": json.dumps(defaults).encode()} | tiny_tokenizer().files()
    save_model(tiny_model(), folder, extra_files=files)
    return folder
