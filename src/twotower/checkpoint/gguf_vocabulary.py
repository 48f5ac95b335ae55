"""A byte-level BPE vocabulary and its chat template in the form that a GGUF file holds."""

import json
import logging
from typing import TYPE_CHECKING, NamedTuple

from twotower.config import TwoTowerConfig
from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_log = logging.getLogger(__name__)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of the format
# How text is split before merging: our tokenizers' two forms under llama.cpp's names for them.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITS: dict[str, list[dict[str, object]]] = {
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
}


class Vocabulary(NamedTuple):
    """Tokens and their types by id, merges in order of rank, and llama.cpp's name of the split."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    split: str
    special: dict[str, int]
    adds_bos: bool
    chat_template: str | None

    def add_to(self, writer: "GGUFWriter") -> None:
        """Put the vocabulary into a file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, token_id in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token_id)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(
    config: TwoTowerConfig, tokenizer: Tokenizer | None, chat_template: str | None = None
) -> Vocabulary:
    """The vocabulary of a tokenizer, or numbered tokens when there is none.

    ValueError (one line) for one that is not byte-level BPE or has more tokens than the model.
    """
    special = _special_ids(config)
    if tokenizer is None:
        tokens = [f"[{index}]" for index in range(config.vocab_size)]
        types, has_bos = [_NORMAL] * len(tokens), "bos" in special
        return Vocabulary(tokens, types, ["[ 0"], "gpt-2", special, has_bos, chat_template)
    values = json.loads(tokenizer.to_json())
    model = values.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(
            f"tokenizer.json: model type {model.get('type')!r} cannot be exported to GGUF; only BPE"
        )
    tokens, types = _tokens(config, model["vocab"], values.get("added_tokens") or [])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    split = _split_name(values.get("pre_tokenizer"))
    return Vocabulary(tokens, types, merges, split, special, tokenizer.adds_bos, chat_template)


def _tokens(
    config: TwoTowerConfig, vocab: dict[str, int], added: list[dict[str, object]]
) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the tokenizer leaves out are marked as unused."""
    tokens = [f"[unused {index}]" for index in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    kinds = dict.fromkeys(vocab, _NORMAL)
    ids = dict(vocab)
    for entry in added:
        text, index = str(entry["content"]), int(str(entry["id"]))
        ids[text], kinds[text] = index, _CONTROL if entry["special"] else _USER_DEFINED
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
    steps = (
        pre_tokenizer.get("pretokenizers", [pre_tokenizer])
        if isinstance(pre_tokenizer, dict)
        else []
    )
    for name, wanted in _SPLITS.items():
        if len(steps) == len(wanted) and all(
            want.items() <= step.items() for want, step in zip(wanted, steps, strict=True)
        ):
            return name
    _log.warning(
        "tokenizer.json splits text in a way that has no name in llama.cpp known here: token ids "
        "mean the same there, but text prompts may be split otherwise"
    )
    return "default"


def _special_ids(config: TwoTowerConfig) -> dict[str, int]:
    """Ids by role. llama.cpp takes token 11 for the end where none is named; ours then is the mask.

    The mask token is never the next token of a text, so such a model runs on, as here.
    """
    mask = None if config.has_own_mask else config.mask_token_id
    roles = {"bos": config.bos_token_id, "pad": config.pad_token_id, "mask": mask}
    ends = config.eos_token_ids or (() if mask is None else (mask,))
    if not ends:
        raise ValueError(
            "eos_token_id=null cannot be exported: llama.cpp would take a token of its own for the "
            "end; name one in config.json"
        )
    if len(ends) > 3:
        raise ValueError(f"eos_token_id={list(ends)} cannot be exported: GGUF has three end tokens")
    roles |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    return {role: index for role, index in roles.items() if index is not None}
