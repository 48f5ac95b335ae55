"""Checkpoints: reading, writing, converting and describing them."""

from twotower.checkpoint.files import resolve
from twotower.checkpoint.load import load_model
from twotower.checkpoint.save import save_backbone, save_model

__all__ = ["load_model", "resolve", "save_backbone", "save_model"]
