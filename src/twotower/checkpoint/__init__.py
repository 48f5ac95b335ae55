"""Checkpoints: reading, writing, converting and describing them."""

from twotower.checkpoint.convert import convert, convert_to_gguf, export_transformers
from twotower.checkpoint.files import find_tokenizer, generation_defaults, resolve
from twotower.checkpoint.gguf import export_gguf
from twotower.checkpoint.inspect import describe
from twotower.checkpoint.load import find_device, has_denoiser, load_checkpoint, load_quantised
from twotower.checkpoint.save import save_backbone, save_two_towers

__all__ = [
    "convert",
    "convert_to_gguf",
    "describe",
    "export_gguf",
    "export_transformers",
    "find_device",
    "find_tokenizer",
    "generation_defaults",
    "has_denoiser",
    "load_checkpoint",
    "load_quantised",
    "resolve",
    "save_backbone",
    "save_two_towers",
]
