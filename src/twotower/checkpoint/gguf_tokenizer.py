"""The tokenizer and chat template inside a GGUF file, as the files that other code reads.

Two kinds: byte-level BPE ("gpt2"), whose way of splitting text has a name, and SentencePiece's BPE
with byte fallback ("llama"), whose merges are made from the scores. Source: llama.cpp
src/llama-vocab.cpp for the patterns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
_BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
}  # fmt: skip
_DIGITS = {"type": "Digits", "individual_digits": True}
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Mistral's since Nemo, and Nemotron's: words end where small letters are followed by a capital.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[dict[str, object]]:
    """Pieces by a pattern, then bytes."""
    regex = {"Regex": pattern}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    return [split, _BYTE_LEVEL | {"use_regex": False}]


# llama.cpp's names of ways to split text.
SPLITS: dict[str, list[dict[str, object]]] = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "qwen2": _split(_PATTERN % ""),
    "llama-bpe": _split(_PATTERN % "{1,3}"),
    "tekken": _split(_TEKKEN),
}
_SAME = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "pixtral": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
# Those whose texts begin with bos where a file is silent, and whose whole words need no merges.
_WHOLE_WORDS = ("llama-bpe", "tekken")
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SPACE = "\u2581"
# Tokens at which llama.cpp ends a text by their names, whatever the metadata says.
ENDS = frozenset({
    "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>",
    "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<EOT>", "_<EOT>", "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
})  # fmt: skip


def with_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A file's metadata with what llama.cpp takes where its tokenizer is silent, and one name for
    each way of splitting text.
    """
    prefix = "tokenizer.ggml"
    is_pieces = metadata.get(f"{prefix}.model") == "llama"
    name = metadata.get(f"{prefix}.pre", "default")
    split = _SAME.get(name, name)
    ids = {"unknown": 0, "bos": 1, "eos": 2} if is_pieces else {}
    found = {f"{prefix}.{role}_token_id": index for role, index in ids.items()}
    found[f"{prefix}.add_bos_token"] = is_pieces or split in _WHOLE_WORDS
    return {**found, **metadata, f"{prefix}.pre": split}


def ends_by_name(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of a file's special tokens that end a text because of their names."""
    tokens, types = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    return [
        index
        for index, token in enumerate(tokens)
        if token in ENDS and types[index] in (CONTROL, USER_DEFINED)
    ]


def numbered_tokens(count: int) -> list[str]:
    """The tokens of a file that was written without a tokenizer: llama.cpp wants some."""
    return [f"[{index}]" for index in range(count)]


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a GGUF file's metadata `with_defaults`; neither
    for numbered tokens.

    ValueError (one line) for a kind of tokenizer that is not supported.
    """
    prefix = "tokenizer.ggml"
    tokens, types = metadata[f"{prefix}.tokens"], metadata[f"{prefix}.token_type"]
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise ValueError("its tokenizer has tokens without a type, or one twice; fetch it again")
    if tokens == numbered_tokens(len(tokens)):
        return {}
    kind = metadata[f"{prefix}.model"]
    if kind == "gpt2":
        parts = _byte_level(metadata)
    elif kind == "llama":
        parts = _sentence_piece(metadata)
    else:
        raise ValueError(f"tokenizer {kind!r} is not supported; read from GGUF are gpt2, llama")
    added = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[index] in (CONTROL, UNKNOWN),
        }
        for index, token in enumerate(tokens)
        if types[index] in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": added, **parts,
    }  # fmt: skip
    return {
        "tokenizer.json": as_json(tokenizer),
        "tokenizer_config.json": as_json(_roles(metadata, tokens)),
    }


def _roles(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, object]:
    """Special tokens by role, whether a text begins with one, and the chat template."""
    found: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, theirs in _ROLES.items():
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None and 0 <= index < len(tokens):
            found[f"{role}_token"] = tokens[index]
    found["add_bos_token"] = bool(metadata["tokenizer.ggml.add_bos_token"])
    if template := metadata.get("tokenizer.chat_template"):
        found["chat_template"] = template
    return found


def _byte_level(metadata: Mapping[str, Any]) -> dict[str, object]:
    """Byte-level BPE: the vocabulary is written in the alphabet that stands for bytes."""
    name = metadata["tokenizer.ggml.pre"]
    if name not in SPLITS:
        raise ValueError(
            f"its tokenizer splits text by {name!r}, which is not supported; supported are "
            f"{', '.join(SPLITS)}; give the model's folder, which has a tokenizer.json"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    model = {
        "type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        "ignore_merges": name in _WHOLE_WORDS,
    }  # fmt: skip
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[name]},
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def _sentence_piece(metadata: Mapping[str, Any]) -> dict[str, object]:
    """SentencePiece's BPE: spaces are a letter, unknown characters become bytes."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    unknown = metadata["tokenizer.ggml.unknown_token_id"]
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[dict[str, object]] = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *strip,
        ],
    }
    model = {
        "type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges_of(tokens, scores, types), "unk_token": tokens[unknown],
        "fuse_unk": True, "byte_fallback": True,
    }  # fmt: skip
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": decoder,
        "model": model,
    }


def merges_of(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[list[str]]:
    """Every way to make a token of two others, the best token first: what scores decide there."""
    ids = {
        token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED)
    }
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[index], ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def as_json(values: Mapping[str, object]) -> bytes:
    """What a file of it holds."""
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
