"""Tokens to bytes to text: what each token stands for, and text as its tokens arrive.

A token is often a part of a character: text is made of tokens' bytes, by the rules of byte-level
BPE, of sentencepiece (with or without byte fallback) and of word pieces.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class ByteRule:
    """How the written form of a token becomes bytes.

    alphabet: the characters that stand for bytes in byte-level BPE, else empty. replaced: what is
    written otherwise, such as a space as "\u2581". is_spaced: a token is a word of its own, unless
    it begins with `continuing`. num_stripped: spaces that a whole text loses at its start.
    """

    alphabet: Mapping[str, int] = field(default_factory=dict)
    replaced: tuple[tuple[str, str], ...] = ()
    has_byte_tokens: bool = False
    is_spaced: bool = False
    continuing: str = ""
    num_stripped: int = 0

    def bytes_of(self, token: str) -> bytes:
        """The bytes of a token by its written form."""
        if self.alphabet:
            spelt = [self.alphabet.get(character) for character in token]
            known = [byte for byte in spelt if byte is not None]
            return bytes(known) if len(known) == len(spelt) else token.encode()
        if self.is_spaced:
            is_part = self.continuing and token.startswith(self.continuing)
            token = token.removeprefix(self.continuing) if is_part else f" {token}"
        for old, new in self.replaced:
            token = token.replace(old, new)
        if self.has_byte_tokens and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return token.encode()


def num_leading_spaces(text: str, most: int) -> int:
    """How many of the first characters are spaces, `most` at most."""
    return min(most, len(text) - len(text.lstrip(" ")))


class TextStream:
    """Decodes tokens as they arrive; never returns half a character.

    The pieces of all `push` calls and the final `flush` are the text of all tokens as they continue
    another: where a whole text loses a space at its start, a continuation keeps it.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: Iterable[int] = ()) -> None:
        self._token_bytes = token_bytes
        self._skipped = frozenset(skipped)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is now complete, in whole characters."""
        for token in ids:
            if token not in self._skipped:
                self._held += self._decoder.decode(self._token_bytes(token))
        if self._decoder.getstate()[0]:  # bytes of an unfinished character
            return ""
        text, self._held = self._held, ""
        return text

    def flush(self) -> str:
        """End of the text: what is left, with U+FFFD for an unfinished character."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return text
