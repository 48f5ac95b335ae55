"""Training and held-out text made by the project itself: short, regular, checkable documents."""

from twotower.lab.corpus.document import Document, Split, split_of
from twotower.lab.corpus.documents import CATEGORIES, DEFAULT_WEIGHTS, documents, sample

__all__ = ["CATEGORIES", "DEFAULT_WEIGHTS", "Document", "Split", "documents", "sample", "split_of"]
