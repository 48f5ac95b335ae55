"""Small tokenizer files of each kind, as other makers write them."""

from typing import Any

import tokenizers

MARK = "\u2581"  # how sentencepiece writes a space
WORDS = ["a", "b", f"{MARK}a", f"{MARK}b", MARK, "ab", "\u65e5"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "split": True}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def added(number: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def llama() -> dict[str, Any]:
    """sentencepiece BPE with byte fallback, as Llama 2 and Mistral have it."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": ["a b", f"{MARK} a", f"{MARK} b"],
        "unk_token": "<unk>",
        "byte_fallback": True,
    }
    normalizer = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": MARK},
            {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
        ],
    }
    template = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    processor = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return {
        "version": "1.0",
        "added_tokens": [added(n, t) for n, t in enumerate(tokens[:3])],
        "normalizer": normalizer,
        "post_processor": processor,
        "decoder": LLAMA_DECODER,
        "model": model,
    }


def unigram() -> dict[str, Any]:
    vocab = [["<unk>", 0.0], *[[word, -float(len(word))] for word in WORDS]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    return {"version": "1.0", "pre_tokenizer": METASPACE, "decoder": METASPACE, "model": model}


def word_pieces() -> dict[str, Any]:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, ".": 3, "b": 4}
    return {
        "version": "1.0",
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        },
    }  # fmt: skip


def words_alone() -> dict[str, Any]:
    vocab = {"<unk>": 0, "a": 1, "b": 2}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}


def byte_level(**more: Any) -> dict[str, Any]:
    """Byte-level BPE as GPT-2 and Qwen have it, with holes: tokens 0 to 255, 257, 258 and 299."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    return {
        "version": "1.0",
        "added_tokens": [added(257, "<|end|>"), added(258, "<think>", special=False)],
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {**vocab, "zz": 299}, "merges": ["z z"]},
        **more,
    }
