"""What `twotower prepare` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twotower.tokenizer import MIN_VOCAB_SIZE
from twotower.train.shard_writer import PART_TOKENS
from twotower.train.sources import parse_weights

_BUILT_IN_TOKENS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turn text into a tokenizer and a shard of tokens for training."""

    out: Path = Path("data/corpus")
    """Folder to create; it must not exist yet, unless --overwrite is given."""
    input: tuple[Path, ...] = ()
    """Text to use instead of the built-in corpus: files, folders, or quoted patterns such as
    'books/*.parquet'. Files in .jsonl (an object a line) and .parquet have columns, see --columns;
    any other file is text whose documents are separated by blank lines."""
    columns: tuple[str, ...] = ()
    """The column of text, or those of prompt and completion, by name. By default "text", or
    "prompt" and "completion"."""
    weights: tuple[str, ...] = ()
    """The mixture, as in a=3 b=1. Inputs, named by their file's or folder's name without suffix or
    as they were given, get these shares of the tokens, until one ends; without weights all is read.
    Categories of the built-in corpus, as in math=2, replace its own mixture (by documents); beside
    inputs they are one source more, with the sum of their weights."""
    tokens: int | None = None
    """Stop after this many tokens (the last document stays whole). By default 20 million of the
    built-in corpus, and inputs to their end."""
    tokenizer: Path | None = None
    """Tokenizer to reuse: a folder with tokenizer.json. By default one is trained on the same
    text.
    """
    vocab_size: int | None = None
    """Size of the tokenizer to train: at least 260, 1024 if not given. Not together with
    --tokenizer.
    """
    tokenizer_documents: int = 40_000
    """The tokenizer is trained on this many documents from the start of the text."""
    seed: int = 0
    """Seed of the built-in corpus, on which every document depends, and of --shuffle."""
    shuffle: int = 0
    """Draw each document of an input at random from this many that are held in memory; 0 keeps
    their order. Rows are shuffled in training: this is for inputs that are sorted by subject."""
    align: int = 1
    """Fill up with EOS so that every completion begins and ends on a multiple of this: with the
    block size, a denoiser trains on the blocks that it will meet. 1 packs back to back."""
    part_tokens: int = PART_TOKENS
    """Tokens in one file of the shard; longer data is cut into several. No effect on training."""
    overwrite: bool = False
    """Replace an existing shard in the folder once the new one is complete."""

    def __post_init__(self) -> None:
        least = {"tokens": 1, "tokenizer_documents": 1, "align": 1, "part_tokens": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name}: {value} is too small; use at least {minimum}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                "vocab_size: a given tokenizer has its own; leave out vocab_size or tokenizer"
            )
        if self.vocab_size is not None and self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size: {self.vocab_size} is too small; use at least {MIN_VOCAB_SIZE}"
            )
        for name in ("seed", "shuffle"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 or more")
        parse_weights(self.weights)
        self._check_columns()

    def _check_columns(self) -> None:
        if len(self.columns) > 2:
            raise ValueError(
                f"columns: {len(self.columns)} names; give one of text, or prompt and completion"
            )
        for name in ("columns", "shuffle"):
            if getattr(self, name) and not self.input:
                raise ValueError(f"{name}: no effect on the built-in corpus; give input as well")

    @property
    def limit(self) -> int | None:
        """How many tokens to write at most; None reads inputs to their end."""
        return _BUILT_IN_TOKENS if self.tokens is None and not self.input else self.tokens
