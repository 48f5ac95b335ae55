"""The vocabulary: text to token ids and back.

Decides the special ids of our own tokenizers (0 <pad>, 1 <bos>, 2 <eos>, 3 <mask>), that every
digit is a token of its own, and that text can never turn into a special token unless the caller
asks for it: a prompt which contains the letters "<mask>" is encoded as those letters.
"""

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import tokenizers

from twotower.arguments import require, require_unicode, shown
from twotower.paths import usable_path
from twotower.tokenizer.decoding import TextStream, num_leading_spaces
from twotower.tokenizer.rules import read_rule

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# The special tokens of our own tokenizers, in the order of their ids.
ROLES = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>"}


class Tokenizer:
    """A fixed vocabulary: `encode`, `decode`, streaming through `stream`, and the special ids."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: dict[str, str] | None = None,
        adds_bos: bool | None = None,
    ) -> None:
        """`roles` names the special tokens (keys pad, bos, eos, mask); unnamed ones are looked up
        as ours. `adds_bos`: whether prompts begin with bos; None: as the file itself would do.
        """
        require("backend", backend, tokenizers.Tokenizer, "tokenizers.Tokenizer(...)")
        backend.encode_special_tokens = True  # "<mask>" in text is text
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._rule = read_rule(
            None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        )
        self._bytes: dict[int, bytes] = {}
        self._lost = _bytes_without_token(backend, self._rule.alphabet)
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # all ids are below it
        self.missing_ids = frozenset(
            set(range(self.vocab_size)).difference(ids) if len(ids) < self.vocab_size else ()
        )
        ours = {role: name for role, name in ROLES.items() if name in self.special_texts}
        names = ours | (roles or {})
        self._roles = {role: n for role, n in names.items() if self.token_id(n) is not None}
        ids_of = {role: self.token_id(name) for role, name in self._roles.items()}
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = map(ids_of.get, ROLES)
        self._adds_bos = adds_bos

    def unused_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids below a model's vocab_size that are no token: holes, and those past the last."""
        return (*sorted(self.missing_ids), *range(self.vocab_size, vocab_size))

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None if it has no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_name(self, token_id: int) -> str | None:
        """How the vocabulary writes a token; None for an id without one."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def with_roles(self, roles: Mapping[str, str], adds_bos: bool | None = None) -> "Tokenizer":
        """The same vocabulary with other tokens as pad, bos, eos or mask; adds_bos None: as now."""
        adds_bos = self._adds_bos if adds_bos is None else adds_bos
        return Tokenizer(self._backend, self._roles | dict(roles), adds_bos)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The written forms of all special tokens."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def json_text(self) -> str:
        """The tokenizer file's text."""
        text: str = self._backend.to_str()
        return text

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the tokenizer file: equal for equal vocabularies and rules."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    @cached_property
    def _reading_special(self) -> tokenizers.Tokenizer:
        """The same, to which "<mask>" in text is that token."""
        return tokenizers.Tokenizer.from_str(self.json_text)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a prompt begins with bos: as the tokenizer's files say, or as ours do."""
        if self.bos_id is None or self._adds_bos is not None:
            return bool(self._adds_bos) and self.bos_id is not None
        if self._backend.post_processor is not None:
            return bool(self._backend.encode("").ids[:1] == [self.bos_id])
        return self._roles["bos"] == ROLES["bos"]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that a model continues: with bos first where its model expects it."""
        return self.encode(text, add_bos=self.adds_bos)

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, with bos first if `add_bos`.

        With `allow_special` the written form of a special token becomes its id; by default it stays
        text, so that nobody's prompt can smuggle one in. ValueError (one line) for a text that the
        tokenizer's own rules cannot take, or of which they would drop a part.
        """
        require("text", text, str, "a string")
        # As a batch of one: the library's `encode` keeps other threads waiting for a long text.
        (ids,) = self.encode_batch([text], allow_special=allow_special)
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise ValueError("add_bos=True: this tokenizer names no bos token; encode without it")
        return [self.bos_id, *ids]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, without bos."""
        for text in texts:
            require_unicode(text, "the text")
            self._check_bytes(text)
        backend = self._reading_special if allow_special else self._backend
        with refused_panics("this text" if len(texts) == 1 else "one of these texts"):
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _check_bytes(self, text: str) -> None:
        """ValueError for a text with bytes that have no token: the library would leave them out."""
        if not self._lost:
            return
        normalizer = self._backend.normalizer
        known = text if normalizer is None else normalizer.normalize_str(text)
        if lost := next((c for c in known if self._lost.intersection(c.encode())), None):
            raise ValueError(
                f"tokenizer: has no token for {lost!r} and no unknown token, so the text would "
                "lose it; remove it from the text, or take a tokenizer with all 256 bytes"
            )

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The whole text of `ids`; bytes that form no character become U+FFFD. ValueError for an id
        that is no token.
        """
        try:
            ids = list(map(operator.index, ids))
        except TypeError:
            raise ValueError(f"ids={shown(ids)} must be a list of token ids") from None
        skipped = self.special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(token) for token in ids if token not in skipped)
        text = data.decode("utf-8", "replace")
        return text[num_leading_spaces(text, self._rule.num_stripped) :]

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, which may be a part of a character; ValueError for an id
        that is no token.
        """
        found = self._bytes.get(token_id)
        if found is None:
            token = None
            if 0 <= token_id < self.vocab_size:
                token = self._backend.id_to_token(token_id)
            if token is None:
                but = f" but for {len(self.missing_ids)}" if self.missing_ids else ""
                raise ValueError(
                    f"ids: {token_id} is outside the vocabulary; ids are 0 to "
                    f"{self.vocab_size - 1}{but}"
                )
            found = self._bytes[token_id] = self._rule.bytes_of(token)
        return found

    def token_text(self, token_id: int) -> str:
        """How one token looks alone, special tokens by name: for displays of single positions."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A fresh incremental decoder, which leaves special tokens out."""
        return TextStream(self.token_bytes, self.special_ids)

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder` (created if needed).
        ValueError (one line) where that cannot be.
        """
        folder = usable_path("folder", folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.files().items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be written ({error.strerror}); choose another place"
            ) from None

    def files(self) -> dict[str, bytes]:
        """The files that `load_tokenizer` reads, by name: what a checkpoint has to carry."""
        config: dict[str, object] = {f"{role}_token": name for role, name in self._roles.items()}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self._adds_bos is not None:
            config["add_bos_token"] = self._adds_bos
        return {
            TOKENIZER_FILE: self.json_text.encode(),
            TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        }


def _bytes_without_token(
    backend: tokenizers.Tokenizer, alphabet: Mapping[str, int]
) -> frozenset[int]:
    """Bytes that byte-level BPE would leave out of a text."""
    if getattr(backend.model, "unk_token", None) is not None:
        return frozenset()
    return frozenset(b for char, b in alphabet.items() if backend.token_to_id(char) is None)


@contextmanager
def refused_panics(what: str) -> Iterator[None]:
    """Turn the library's bare Exceptions, and its panics, which are none, into a ValueError of one
    line.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer: its rules fail on {what} ({reason})") from None
