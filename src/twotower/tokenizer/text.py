"""Text to token ids and back.

Text never turns into a special token unless the caller asks for it: a prompt which contains the
letters "<mask>" is encoded as those letters.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import tokenizers

from twotower.arguments import require, require_unicode, shown
from twotower.tokenizer.decoding import TextStream, num_leading_spaces
from twotower.tokenizer.vocabulary import Vocabulary


class Tokenizer(Vocabulary):
    """A fixed vocabulary: `encode`, `decode`, streaming through `stream`, and the special ids."""

    def unused_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids below a model's vocab_size that are no token: holes, and those past the last."""
        return (*sorted(self.missing_ids), *range(self.vocab_size, vocab_size))

    @cached_property
    def _reading_special(self) -> tokenizers.Tokenizer:
        """The same, to which "<mask>" in text is that token."""
        return tokenizers.Tokenizer.from_str(self.json_text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that a model continues: with bos first where its model expects it."""
        return self.encode(text, add_bos=self.adds_bos)

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, with bos first if `add_bos`.

        With `allow_special` the written form of a special token becomes its id; by default it stays
        text, so that no prompt can smuggle one in. ValueError (one line) for a text that the
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
        """What one token adds to a text, maybe a part of a character; ValueError for no token."""
        if (found := self._bytes.get(token_id)) is not None:
            return found
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            but = f" but for {len(self.missing_ids)}" if self.missing_ids else ""
            last = f"{self.vocab_size - 1}{but}"
            raise ValueError(f"ids: {token_id} is outside the vocabulary; ids are 0 to {last}")
        found = self._bytes[token_id] = self._rule.bytes_of(token)
        return found

    def token_text(self, token_id: int) -> str:
        """How one token looks alone, special tokens by name: for displays of single positions."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A fresh incremental decoder, which leaves special tokens out."""
        return TextStream(self.token_bytes, self.special_ids)


@contextmanager
def refused_panics(what: str) -> Iterator[None]:
    """Turn the library's bare Exceptions, and panics, which are none, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer: its rules fail on {what} ({reason})") from None
