"""GGUF files as a source of models: block types, tokenizers, and one line for files that lie."""

import json
import shutil
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower import PrepareOptions, load_tokenizer, prepare_data
from twotower.checkpoint import export_gguf, gguf_reader, inspect, load_checkpoint
from twotower.checkpoint.gguf_tokenizer import ENDS, ends_by_name, tokenizer_files, with_defaults
from twotower.families import read_config
from twotower.families.rope import rope_from_gguf
from twotower.tokenizer import TOKENIZER_FILE
from twotower.train.shard import Shard

pytest.importorskip("gguf")
import gguf

from tiny_gguf import Kind, blocks

ADD = {int: "uint32", float: "float32", bool: "bool", str: "string"}
WIDTH, INNER, TOKENS = 256, 512, 300  # K types come in blocks of 256
LETTERS = [chr(0x100 + index) if index < 33 or index > 126 else chr(index) for index in range(256)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf_reader, "_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(
    file: Path,
    kind: Any = Kind.F32,
    architecture: str = "llama",
    without: str = "",
    pre: str = "smollm",
    merges: Sequence[Any] = ("h i",),
    names: Sequence[str] = (),
    **extra: Any,
) -> dict[str, np.ndarray]:
    """A one-block model whose matrices are of a type; returns every tensor's values."""
    writer = gguf.GGUFWriter(file, architecture)
    sizes = {
        "context_length": 64, "embedding_length": WIDTH, "block_count": 1,
        "feed_forward_length": INNER, "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    for name, value in (sizes | extra).items():
        if name != without:
            add = getattr(writer, f"add_{ADD[type(value)]}")
            add(name if "." in name and "head" not in name else f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = [f"<{index}>" for index in range(TOKENS - 257)] + [*LETTERS, "hi"]
    tokens[3 : 3 + len(names)] = names
    writer.add_token_list(tokens)
    writer.add_token_types([3] * (TOKENS - 257) + [1] * 257)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    values: dict[str, np.ndarray] = {}
    for name, shape in (
        ("token_embd.weight", (TOKENS, WIDTH)),
        ("blk.0.attn_norm.weight", (WIDTH,)),
        ("blk.0.attn_q.weight", (WIDTH, WIDTH)),
        ("blk.0.attn_k.weight", (WIDTH // 2, WIDTH)),
        ("blk.0.attn_v.weight", (WIDTH // 2, WIDTH)),
        ("blk.0.attn_output.weight", (WIDTH, WIDTH)),
        ("blk.0.ffn_norm.weight", (WIDTH,)),
        ("blk.0.ffn_gate.weight", (INNER, WIDTH)),
        ("blk.0.ffn_up.weight", (INNER, WIDTH)),
        ("blk.0.ffn_down.weight", (WIDTH, INNER)),
        ("output_norm.weight", (WIDTH,)),
    ):
        if name == without:
            continue
        own = Kind.F32 if len(shape) == 1 else kind
        data = blocks(shape, own, seed=len(values))
        values[name] = gguf.quants.dequantize(data, own)
        writer.add_tensor(name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("kind", gguf_reader.TYPES)
def test_every_type_becomes_the_numbers_it_means(tmp_path: Path, kind: str) -> None:
    """Silent failure: a block type is read with another one's layout, or rows get mixed up."""
    values = write(tmp_path / "m.gguf", Kind[kind])
    model = load_checkpoint(tmp_path / "m.gguf", towers="context")
    found = {name: value.numpy() for name, value in model.state_dict().items()}
    tower = "context_tower"
    for ours, theirs in (
        (f"{tower}.embeddings.weight", "token_embd.weight"),
        ("context_lm_head.weight", "token_embd.weight"),
        (f"{tower}.layers.0.mixer.v_proj.weight", "blk.0.attn_v.weight"),
        (f"{tower}.layers.0.mixer.o_proj.weight", "blk.0.attn_output.weight"),
        (f"{tower}.layers.1.mixer.down_proj.weight", "blk.0.ffn_down.weight"),
        (f"{tower}.norm_f.weight", "output_norm.weight"),
    ):
        np.testing.assert_array_equal(found[ours], values[theirs])
    halves = values["blk.0.attn_k.weight"].reshape(2, 32, 2, WIDTH).swapaxes(1, 2)
    np.testing.assert_array_equal(
        found[f"{tower}.layers.0.mixer.k_proj.weight"], halves.reshape(WIDTH // 2, WIDTH)
    )
    assert inspect.describe(tmp_path / "m.gguf").files.elements_by_dtype[kind] > 0  # type: ignore[union-attr]


def test_the_tokenizer_and_the_template_come_along(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", **{"tokenizer.chat_template": "{{ messages }}"})
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(tokenizer.encode("no <2> here")) == "no <2> here"
    assert tokenizer.encode("<2>", allow_special=True) == [2]
    (tmp_path / "a.txt").write_text("no <2> here")
    options = PrepareOptions(
        input=[tmp_path / "a.txt"], tokenizer=tmp_path / "m.gguf", output=tmp_path / "shard"
    )
    prepare_data(options)  # a shard for training beside this model
    shard = Shard(tmp_path / "shard")
    assert shard.tokenizer.fingerprint == tokenizer.fingerprint and shard.meta.special.eos == (2,)


def test_a_second_look_reads_no_header_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf")
    first = gguf_reader.open_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_reader, "_open", None)
    assert gguf_reader.open_gguf(tmp_path / "m.gguf") == first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3' is not supported; read from GGUF are"),
        ({"kind": Kind.TQ1_0}, "token_embd.weight is of type TQ1_0, which is not supported"),
        ({"without": "block_count"}, "lacks the metadata 'block_count'"),
        ({"without": "blk.0.ffn_up.weight"}, "1 missing: context_tower.layers.1.mixer.up_proj"),
        ({"embedding_length": 128}, "misshapen"),
        ({"merges": [7]}, "truncated or not a GGUF file ('int' object has no attribute 'split')"),
        ({"block_count": 10**9}, "num_hidden_layers=1000000000 must be between"),
        ({"attention.head_count": 0}, "num_attention_heads=0 must be between"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"split.count": "three"}, "truncated or not a GGUF file ("),
        ({"llama.expert_count": 8}, "expert_count=8 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_beta_fast": 8.0,
            },
            "rope.scaling.yarn_beta_fast=8.0 is not supported; only 32.0",
        ),
        ({"llama.rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor=1.5 is not supported"),
        ({"llama.attention.causal": False}, "attention.causal=False is not supported; only True"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, cache: Path, changes: dict[str, Any], expected: str
) -> None:
    """Silent failure: half a model is loaded, or a traceback shown."""
    write(tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "m.gguf", towers="context")
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert "m.gguf" in str(error.value) or "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4),
        ({"scaling.factor": 4.0}, 4),
        ({"scale_linear": 4.0}, 4),
        ({"scaling.factor": 2.0, "scale_linear": 4.0}, 2),
        ({"scaling.type": "none", "scaling.factor": 4.0}, 1),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, 1),
    ],
)
def test_positions_are_stretched_as_llama_cpp_stretches_them(
    tmp_path: Path, changes: dict[str, Any], factor: float
) -> None:
    """Silent failure: a file of older days says the factor alone, and long texts go wrong."""
    write(tmp_path / "m.gguf", **{f"llama.rope.{name}": value for name, value in changes.items()})
    config = read_config(gguf_reader.open_gguf(tmp_path / "m.gguf"))
    assert config.context.rotary is not None and config.context.rotary[0].factor == factor


def test_two_scalings_at_once_are_refused() -> None:
    """Silent failure: llama.cpp multiplies both, and we took one of them."""
    for more in ({}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}):
        with pytest.raises(ValueError, match="no known scaling"):
            rope_from_gguf(more, 64, [2.0] * 32)
    with pytest.raises(ValueError, match=r"factor=4.0 beside rope_freqs\.weight is not"):
        rope_from_gguf({"rope.scaling.factor": 4.0}, 64, [2.0] * 32)


def test_every_end_of_a_text_is_one_here(tmp_path: Path) -> None:
    """Silent failure: an answer goes on behind the end of a turn, up to its last token."""
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    write(tmp_path / "m.gguf", **ends)
    assert read_config(gguf_reader.open_gguf(tmp_path / "m.gguf")).eos_token_ids == (2, 7)


def test_ends_by_name_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Silent failure: a file names <|im_end|> alone, and a text goes on behind <|endoftext|>, where
    llama.cpp's ends. A normal token of that name is a piece of text.
    """
    names = sorted(ENDS)
    tokens = ["<pad>", "<bos>", *names, "<|im_start|>"]
    types = [3] * (len(names) + 1) + [4, 3]
    found = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert ends_by_name(found) == list(range(2, 2 + len(names)))
    assert ends_by_name(found | {"tokenizer.ggml.token_type": [1] * len(tokens)}) == []


def test_a_file_with_many_ends_is_read_and_written(tmp_path: Path) -> None:
    """Guards Qwen's files, which have five: GGUF names three, the rest are known by name."""
    ends = ["<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
    write(tmp_path / "m.gguf", names=ends)
    model = load_checkpoint(tmp_path / "m.gguf", towers="context")
    assert model.config.eos_token_ids == (2, 3, 4, 5, 6, 7)
    export_gguf(model, tmp_path / "n.gguf", tokenizer=load_tokenizer(tmp_path / "m.gguf"))
    again = read_config(gguf_reader.open_gguf(tmp_path / "n.gguf"))
    assert sorted(again.eos_token_ids) == [2, 3, 4, 5, 6, 7]


def test_a_silent_tokenizer_means_what_llama_cpp_takes(tmp_path: Path) -> None:
    """Silent failure: Llama 3 reads prompts without the token that begins each of its texts, or
    SentencePiece's file without ids never ends one.
    """
    for pre in ("llama-bpe", "llama3", "llama-v3", "pixtral", "tekken"):
        write(tmp_path / f"{pre}.gguf", pre=pre)
        assert load_tokenizer(tmp_path / f"{pre}.gguf").encode_prompt("hi") == [1, TOKENS - 1]
    write(tmp_path / "n.gguf", pre="llama-bpe", **{"tokenizer.ggml.add_bos_token": False})
    assert load_tokenizer(tmp_path / "n.gguf").encode_prompt("hi") == [TOKENS - 1]
    write(tmp_path / "q.gguf", pre="deepseek-r1-qwen")
    write(tmp_path / "r.gguf", pre="qwen2")
    q, r = (load_tokenizer(tmp_path / f"{name}.gguf") for name in "qr")
    assert q.json_text == r.json_text and not q.adds_bos
    silent = {n: value for n, value in metadata().items() if not n.endswith("_token_id")}
    said = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.pre": "default"} | metadata()
    assert with_defaults(silent) == with_defaults(said) == said


@pytest.mark.parametrize("keep", [0, 3, 8, 100, 5_000, 0.5, 0.999])
def test_a_truncated_file_is_one_line_and_leaves_nothing(
    tmp_path: Path, cache: Path, keep: float
) -> None:
    write(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    count = int(keep * len(content)) if isinstance(keep, float) else int(keep)
    (tmp_path / "m.gguf").write_bytes(content[:count])
    with pytest.raises(ValueError, match="truncated") as error:
        load_checkpoint(tmp_path / "m.gguf", towers="context")
    assert "\n" not in str(error.value)
    assert not cache.exists() or not [*cache.iterdir()]


ARRAY = struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 1 << 60)  # "a": numbers without end
LIES = {
    "an array": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + ARRAY, "it ends before its data does"),
    "an array of very many": (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
        + ARRAY[:-8]
        + struct.pack("<Q", 9999)
        + bytes(1 << 17),
        "its header has more than 4,096 values",
    ),
    "tensors": (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0), "more than 32,768 tensors"),
    "fields": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60), "more than 4,096 fields"),
    "big-endian tensors": (struct.pack(">4sIQQ", b"GGUF", 3, 1 << 60, 0), "more than 32,768 tens"),
}


@pytest.mark.parametrize("name", LIES)
def test_counts_that_lie_are_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, name: str
) -> None:
    """Silent failure: the library walks 2^60 values that are not there, and keeps each."""
    content, said = LIES[name]
    monkeypatch.setattr(gguf_reader, "_MAX_READS", 4096)  # of which each takes microseconds
    (tmp_path / "m.gguf").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=said):
        gguf_reader.open_gguf(tmp_path / "m.gguf")
    assert time.monotonic() - start < 5


def test_an_index_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Silent failure: a folder says which file of this machine is read, and where."""
    write(tmp_path / "m.gguf")
    folder = tmp_path / "theirs"
    shutil.copytree(gguf_reader.open_gguf(tmp_path / "m.gguf"), folder)
    with pytest.raises(ValueError, match="not an index that was made here; name the GGUF file"):
        load_checkpoint(folder, towers="context")


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    folder = gguf_reader.open_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(ValueError, match=r"m\.gguf: has gone"):
        load_checkpoint(folder, towers="context")


def metadata(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = {"\u2581": -3.0, "a": -4.0, "b": -5.0, "ab": -1.0, "\u2581ab": -2.0, "\u2581a": -2.5}
    found = {
        "model": "llama", "tokens": [*tokens, *pieces],
        "scores": [0.0] * len(tokens) + [*pieces.values()],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in (found | changes).items()}


def test_sentence_pieces(tmp_path: Path) -> None:
    """Silent failure: scores mean another order of merges, or bytes come out as question marks."""
    for name, content in tokenizer_files(with_defaults(metadata())).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    ids = {token: index for index, token in enumerate(metadata()["tokenizer.ggml.tokens"])}
    assert tokenizer.encode("ab") == [ids["\u2581ab"]]
    assert tokenizer.encode("a ab") == [ids["\u2581a"], ids["\u2581ab"]]
    assert tokenizer.encode("b") == [ids["\u2581"], ids["b"]]
    euro = [ids["\u2581"], *(ids[f"<0x{byte:02X}>"] for byte in "\u20ac".encode())]
    assert tokenizer.encode("\u20ac") == euro
    assert tokenizer.decode(tokenizer.encode("ab \u20ac a")) == "ab \u20ac a"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True


@pytest.mark.parametrize(
    "changes", [{"unknown_token_id": 10**6}, {"scores": [0.0]}, {"token_type": []}]
)
def test_lists_of_other_lengths_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Guards a traceback: the lists of a tokenizer are believed to be of one length."""
    write(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_reader, "with_defaults", lambda said: said | metadata(**changes))
    with pytest.raises(ValueError, match=r"m\.gguf: .*; fetch it again"):
        gguf_reader.open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "bert"}, "tokenizer 'bert' is not supported; read from GGUF are gpt2, llama"),
        ({"model": "gpt2", "pre": "deepseek-llm", "merges": []}, "splits text by 'deepseek-llm'"),
        ({"token_type": [1]}, "tokens without a type"),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        tokenizer_files(with_defaults(metadata(**changes)))
    assert TOKENIZER_FILE == "tokenizer.json"
