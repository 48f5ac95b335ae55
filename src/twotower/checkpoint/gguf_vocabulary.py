"""A BPE vocabulary and its chat template in the form that a GGUF file holds.

Two kinds, as `gguf_tokenizer` reads them: byte-level, and SentencePiece's with byte fallback.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from twotower.checkpoint.gguf_tokenizer import (
    BYTE,
    CONTROL,
    ENDS,
    NORMAL,
    SPACE,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of,
    numbered_tokens,
)
from twotower.config import TwoTowerConfig
from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_log = logging.getLogger(__name__)
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_HARMLESS = {"trim_offsets"}  # fields of a step that change no token


class Vocabulary(NamedTuple):
    """Tokens and their types by id, how they merge, and llama.cpp's name of the split.

    Byte-level: merges in order of rank. SentencePiece: scores by id, and whether a space is put
    before a text.
    """

    tokens: list[str]
    types: list[int]
    split: str
    special: dict[str, int]
    adds_bos: bool
    chat_template: str | None
    merges: list[str]
    scores: list[float] | None = None
    adds_space: bool = False

    def add_to(self, writer: "GGUFWriter") -> None:
        """Put the vocabulary into a file's metadata."""
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is None:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        for role, token_id in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token_id)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(
    config: TwoTowerConfig, tokenizer: Tokenizer | None, chat_template: str | None = None
) -> Vocabulary:
    """The vocabulary of a tokenizer, or numbered tokens when there is none.

    ValueError (one line) for one of another kind, or with more tokens than the model.
    """
    special = _special_ids(config, tokenizer)
    if tokenizer is None:
        tokens = numbered_tokens(config.vocab_size)
        types, has_bos = [NORMAL] * len(tokens), "bos" in special
        return Vocabulary(tokens, types, "gpt-2", special, has_bos, chat_template, ["[ 0"])
    values = json.loads(tokenizer.json_text)
    model = values.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(
            f"tokenizer.json: model type {model.get('type')!r} cannot be exported to GGUF; only BPE"
        )
    tokens, types = _tokens(config, model["vocab"], values.get("added_tokens") or [])
    pairs = [tuple(p.split(" ", 1) if isinstance(p, str) else p) for p in model["merges"]]
    shared = special, tokenizer.adds_bos, chat_template
    if any(step["type"] == "ByteLevel" for step in _steps(values.get("decoder"))):
        split = _split_name(values.get("pre_tokenizer"))
        return Vocabulary(tokens, types, split, *shared, list(map(" ".join, pairs)))
    if not model.get("byte_fallback"):
        raise ValueError(
            "tokenizer.json: without bytes for tokens, or byte_fallback, it cannot be exported to "
            "GGUF"
        )
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        types[unknown] = UNKNOWN
        special["unk"] = unknown
    for index, token in enumerate(tokens):
        types[index] = BYTE if _BYTE_TOKEN.fullmatch(token) else types[index]
    scores = _scores(tokens, pairs)
    adds_space = _adds_space(values)
    if adds_space is None or not _same_merges(pairs, merges_of(tokens, scores, types)):
        _warn()
    return Vocabulary(
        tokens, types, "default", *shared, merges=[], scores=scores, adds_space=adds_space or False
    )


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """The better a merge ranks, the higher the score of what it makes."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(pairs))) for token in tokens]


def _same_merges(pairs: list[tuple[str, ...]], found: list[list[str]]) -> bool:
    """Whether scores stand for the merges; in which order two pairs make one token is nothing."""
    made = ["".join(pair) for pair in pairs]
    return made == ["".join(pair) for pair in found] and {*pairs} == {*map(tuple, found)}


def _adds_space(values: Mapping[str, Any]) -> bool | None:
    """Whether a text begins with a space of the tokenizer's; None for steps of another kind."""
    steps = [*_steps(values.get("normalizer")), *_steps(values.get("pre_tokenizer"))]
    prepended = {"type": "Prepend", "prepend": SPACE}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps in ([prepended, replaced], [replaced]):
        return len(steps) == 2
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split", True):
        return bool(steps[0].get("prepend_scheme", "always") != "never")
    return None


def _steps(part: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer as the list of its steps."""
    if not isinstance(part, dict):
        return []
    inner = [part[name] for name in ("normalizers", "pretokenizers", "decoders") if name in part]
    return inner[0] if inner else [part]


def _tokens(
    config: TwoTowerConfig, vocab: dict[str, int], added: list[dict[str, object]]
) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the tokenizer leaves out are marked as unused."""
    tokens = [f"[unused {index}]" for index in range(config.vocab_size)]
    types = [UNUSED] * config.vocab_size
    kinds = dict.fromkeys(vocab, NORMAL)
    ids = dict(vocab)
    for entry in added:
        text, index = str(entry["content"]), int(str(entry["id"]))
        ids[text], kinds[text] = index, CONTROL if entry["special"] else USER_DEFINED
    if (most := max(ids.values(), default=0)) >= config.vocab_size:
        raise ValueError(
            f"tokenizer.json: holds token id {most} but the model has vocab_size="
            f"{config.vocab_size}; convert with the tokenizer that the model was trained with"
        )
    for text, index in ids.items():
        tokens[index], types[index] = text, kinds[text]
    return tokens, types


def _split_name(pre_tokenizer: object) -> str:
    """llama.cpp's name for a way of splitting text; token ids need none, so unknown ones pass."""
    steps = list(map(_meaning, _steps(pre_tokenizer)))
    for name, wanted in SPLITS.items():
        if steps == list(map(_meaning, wanted)):
            return name
    _warn()
    return "default"


def _meaning(step: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in step.items() if name not in _HARMLESS}


def _warn() -> None:
    _log.warning(
        "tokenizer.json splits text in a way that has no name in llama.cpp known here: token ids "
        "mean the same there, but text prompts may be split otherwise"
    )


def _special_ids(config: TwoTowerConfig, tokenizer: Tokenizer | None) -> dict[str, int]:
    """Ids by role. llama.cpp takes token 11 for the end where none is named; ours then is the mask.

    The mask token is never the next token of a text, so such a model runs on, as here. Beyond three
    ends, those that llama.cpp knows by name are left out.
    """
    mask = None if config.has_own_mask else config.mask_token_id
    roles = {"bos": config.bos_token_id, "pad": config.pad_token_id, "mask": mask}
    ends = config.eos_token_ids or (() if mask is None else (mask,))
    # The tokenizer's own first: llama.cpp gives a chat template the name of that one.
    eos_id = None if tokenizer is None else tokenizer.eos_id
    ends = tuple(sorted(ends, key=lambda end: end != eos_id))
    known = [t for t in ends if tokenizer is not None and tokenizer.token_name(t) in ENDS]
    if len(ends) > 3:
        ends = tuple(sorted(ends, key=lambda end: (end != eos_id, end in known)))
    if not ends:
        raise ValueError(
            "eos_token_id=null cannot be exported: llama.cpp would take a token of its own for the "
            "end; name one in config.json"
        )
    if not {*ends[3:]} <= {*known}:
        raise ValueError(f"eos_token_id={list(ends)} cannot be exported: GGUF has three end tokens")
    roles |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    return {role: index for role, index in roles.items() if index is not None}
