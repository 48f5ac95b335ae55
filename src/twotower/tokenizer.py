"""Text to token ids and back: the only importer of `tokenizers`.

Decides the special ids of our own tokenizers (0 <pad>, 1 <bos>, 2 <eos>, 3 <mask>), that every
digit is a token of its own, and that text can never turn into a special token unless the caller
asks for it: a prompt which contains the letters "<mask>" is encoded as those letters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # the special tokens and every byte
_ROLES = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>"}
_REPLACEMENT = "\ufffd"  # what decoding shows for bytes that are not a whole character


class Tokenizer:
    """A fixed vocabulary: `encode`, `decode`, streaming through `stream`, and the special ids."""

    def __init__(self, backend: tokenizers.Tokenizer, roles: dict[str, str] | None = None) -> None:
        """`roles` names the special tokens (keys pad, bos, eos, mask); unnamed ones are looked up
        as ours.
        """
        self._json = backend.to_str()
        self._special = backend
        self._plain = tokenizers.Tokenizer.from_str(self._json)
        self._plain.encode_special_tokens = True  # "<mask>" in text is text
        # All ids are below it, provided that the vocabulary has no gaps; special tokens included.
        self.vocab_size = int(self._plain.get_vocab_size(with_added_tokens=True))
        names = _ROLES | (roles or {})
        self._roles = {role: name for role, name in names.items() if self._id(name) is not None}

    def _id(self, token: str) -> int | None:
        found: int | None = self._plain.token_to_id(token)
        return found

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The written forms of all special tokens."""
        added = self._special.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        added = self._special.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def to_json(self) -> str:
        """The tokenizer file's text."""
        return self._json

    @property
    def pad_id(self) -> int | None:
        return self._role_id("pad")

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos")

    @property
    def eos_id(self) -> int | None:
        return self._role_id("eos")

    @property
    def mask_id(self) -> int | None:
        return self._role_id("mask")

    def _role_id(self, role: str) -> int | None:
        return self._id(self._roles[role]) if role in self._roles else None

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the tokenizer file: equal for equal vocabularies and rules."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, with <bos> first if `add_bos`.

        With `allow_special` the written form of a special token becomes its id; by default it stays
        text, so that nobody's prompt can smuggle one in.
        """
        backend = self._special if allow_special else self._plain
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return self._with_bos(ids) if add_bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once (no <bos>, special tokens stay text)."""
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None:
            raise ValueError("add_bos=True: this tokenizer names no bos token; encode without it")
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD. ValueError for an id outside
        the vocabulary.
        """
        limit = self.vocab_size
        outside = next((i for i in ids if not 0 <= i < limit), None)
        if outside is not None:
            raise ValueError(f"ids: {outside} is outside the vocabulary; ids are 0 to {limit - 1}")
        text: str = self._plain.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_text(self, token_id: int) -> str:
        """How one token looks alone, special tokens by name: for displays of single positions."""
        return self.decode([token_id], skip_special=False)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(self, skip_special=skip_special)

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder` (created if needed)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """The files that `load_tokenizer` reads, by name: what a checkpoint has to carry."""
        config: dict[str, object] = {f"{role}_token": name for role, name in self._roles.items()}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        return {
            TOKENIZER_FILE: self._json.encode(),
            TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        }


class TextStream:
    """Decodes tokens as they arrive; never returns half a character.

    The pieces of all `push` calls and the final `flush` together equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Already returned tokens, kept because some decoders treat the start of a text differently.
        self._previous: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is now complete ("" while a character is
        unfinished).
        """
        self._pending.extend(ids)
        text = self._pending_text()
        if text.endswith(_REPLACEMENT):
            return ""
        if text:
            self._previous, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """End of the text: what is left, with U+FFFD for an unfinished character."""
        text = self._pending_text()
        self._previous, self._pending = self._pending, []
        return text

    def _pending_text(self) -> str:
        before = self._decode(self._previous)
        return self._decode(self._previous + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


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
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer from a folder with `tokenizer.json` or from that file itself.

    Special tokens are named by `tokenizer_config.json` beside it, when present.
    ValueError (one line) when the file is missing, damaged or of another kind.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer: no file {file}; give a folder that holds {TOKENIZER_FILE}, or that file"
        )
    content = _read_json_object(file)
    if "model" not in content:
        raise ValueError(
            f"tokenizer: {file} is not a tokenizer file (it has no 'model'); give a "
            f"{TOKENIZER_FILE}"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a damaged file
        reason = " ".join(str(error).split())
        raise ValueError(
            f"tokenizer: {file} cannot be read ({reason}); get the file again"
        ) from error
    config = file.parent / TOKENIZER_CONFIG_FILE
    return Tokenizer(backend, _read_roles(_read_json_object(config)) if config.is_file() else None)


def _read_json_object(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"tokenizer: {file} is not JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer: {file} holds no JSON object; get the file again")
    return content


def _read_roles(config: dict[str, object]) -> dict[str, str]:
    """Special tokens by role; each is stored as a string or as {"content": string}."""
    roles: dict[str, str] = {}
    for role in _ROLES:
        token = config.get(f"{role}_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            roles[role] = name
    return roles
