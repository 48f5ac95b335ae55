"""The byte rule of a tokenizer file: which kind its decoder is, and what that does to tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from twotower.tokenizer.decoding import ByteRule

# What the library's word pieces do about spaces before punctuation.
_UNSPACED = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE: printable bytes stand for themselves, others are characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def read_rule(decoder: Mapping[str, Any] | None) -> ByteRule:
    """The rule of a tokenizer file's decoder; ValueError (one line) for one of another kind."""
    steps = flatten(decoder, "decoders")
    match steps:
        case []:
            return ByteRule(is_spaced=True, num_stripped=1)
        case [{"type": "ByteLevel"}]:
            return ByteRule(alphabet=byte_alphabet())
        case [{"type": "WordPiece", "prefix": str(mark), "cleanup": cleanup}]:
            replaced = tuple((f" {part}", part) for part in _UNSPACED if cleanup)
            return ByteRule(is_spaced=True, continuing=mark, replaced=replaced, num_stripped=1)
    return _read_sentencepiece(steps)


def _read_sentencepiece(steps: Sequence[Mapping[str, Any]]) -> ByteRule:
    replaced: list[tuple[str, str]] = []
    has_byte_tokens, num_stripped, is_fused = False, 0, False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                replaced.append((mark, " "))
                num_stripped += step.get("prepend_scheme", "always") != "never"
            case {"type": "ByteFallback"}:
                has_byte_tokens = True
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if is_fused:
                num_stripped += start
            case _:
                raise ValueError(
                    f"tokenizer: a decoder with {step.get('type')} is not supported; ByteLevel, "
                    "WordPiece and those of sentencepiece are"
                )
    return ByteRule(
        replaced=tuple(replaced), has_byte_tokens=has_byte_tokens, num_stripped=num_stripped
    )


def flatten(part: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """A part of a tokenizer file as the list of its steps; `members` names those of a Sequence."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for member in part[members] for step in flatten(member, members)]
