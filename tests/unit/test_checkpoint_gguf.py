"""GGUF files: what is stored and how exactly, what is refused, and what a failure leaves behind."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from tiny_checkpoint import TEXT
from tiny_models import fresh_model, tiny_config
from tiny_tokenizers import BYTE_LEVEL
from twotower import TwoTower
from twotower.checkpoint import convert_to_gguf, export_gguf, save_two_towers
from twotower.checkpoint.gguf import Precision
from twotower.checkpoint.gguf_vocabulary import read_vocabulary
from twotower.cli.convert import ConvertOptions
from twotower.cli.convert import run as run_convert
from twotower.tokenizer import Tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf")

# Largest error of a stored number, as a share of the largest in its row. Q8_0: half a step of
# 1/127, and 127 times the rounding of its float16 scale.
ROUNDING = {
    "F32": 0.0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": 0.5 / 127 + 2**-11,
    "Q4_0": 0.5 / 8 + 0.07,
}


def dense() -> TwoTower:
    return fresh_model(hybrid_override_pattern="M*-", hidden_size=32)


def read(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Every tensor of a file by name: its element type, and its values as float32."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]),
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def metadata(file: Path, key: str) -> object:
    return gguf.GGUFReader(file).fields[key].contents()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0", "q4_0"])
def test_matrices_are_stored_within_their_rounding(tmp_path: Path, dtype: Precision) -> None:
    """Guards against rows cut wrongly into blocks; rows of 24 numbers have none and get float16."""
    model = dense()
    export_gguf(model, tmp_path / "a.gguf", dtype=dtype)
    stored = read(tmp_path / "a.gguf")
    wanted = {
        "float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0",
    }[dtype]  # fmt: skip
    unquantised = "F16" if dtype.startswith("q") else wanted
    heads = "Q8_0" if dtype == "q4_0" else wanted
    layers = model.context_tower.layers
    for name, parameter, kind in (
        ("token_embd", model.context_tower.embeddings, heads),
        ("output", model.context_lm_head, heads),
        ("blk.0.ssm_in", layers[0].mixer.in_proj, wanted),
        ("blk.1.attn_k", layers[1].mixer.k_proj, wanted),
        ("blk.2.ffn_up", layers[2].mixer.up_proj, wanted),
        ("blk.2.ffn_down", layers[2].mixer.down_proj, unquantised),
    ):
        found, values = stored[f"{name}.weight"]
        assert found == kind, name
        true = parameter.weight.detach().numpy()
        largest = np.abs(true).max(axis=-1, keepdims=True)
        assert (np.abs(values - true) <= ROUNDING[kind] * largest).all(), name


def test_the_scan_and_the_norms_keep_float32(tmp_path: Path) -> None:
    """Guards a decay rate in 8 bits: it acts on every step of the recurrence."""
    model = dense()
    export_gguf(model, tmp_path / "a.gguf", dtype="q8_0")
    stored = read(tmp_path / "a.gguf")
    mamba = model.context_tower.layers[0].mixer
    for name, values in {
        "ssm_a": -mamba.A_log.exp().unsqueeze(1),
        "ssm_d": mamba.D.unsqueeze(1),
        "ssm_dt.bias": mamba.dt_bias,
        "ssm_conv1d.weight": mamba.conv1d.weight.squeeze(1),
        "ssm_norm.weight": mamba.norm.weight.unflatten(0, (2, 16)),
    }.items():
        kind, found = stored[f"blk.0.{name}"]
        assert kind == "F32"
        np.testing.assert_allclose(found, values.detach().numpy(), rtol=1e-6)


def test_experts_and_routers_are_stored(tmp_path: Path) -> None:
    model = fresh_model(hybrid_override_pattern="M*E", hidden_size=32, routed_scaling_factor=2.5)
    export_gguf(model, tmp_path / "a.gguf", dtype="q8_0")
    stored, moe = read(tmp_path / "a.gguf"), model.context_tower.layers[2].mixer
    kinds = {name: kind for name, (kind, _) in stored.items()}
    assert kinds["blk.2.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.2.ffn_down_exps.weight"] == "F16"  # rows of 12
    assert kinds["blk.2.ffn_gate_inp.weight"] == kinds["blk.2.exp_probs_b.bias"] == "F32"
    assert (stored["blk.2.ffn_gate_inp.weight"][1] == moe.gate.weight.detach().numpy()).all()
    assert stored["blk.2.ffn_up_exps.weight"][1].shape == (4, 12, 32)
    assert metadata(tmp_path / "a.gguf", "general.architecture") == "nemotron_h_moe"
    assert metadata(tmp_path / "a.gguf", "nemotron_h_moe.feed_forward_length") == [0, 0, 12]
    assert metadata(tmp_path / "a.gguf", "nemotron_h_moe.expert_weights_scale") == 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "M*E-"}, "pattern=M\\*E- cannot be exported: .* not both"),
        ({"hybrid_override_pattern": "M-M-"}, "llama.cpp wants M and \\* layers"),
        ({"hybrid_override_pattern": "*-"}, "llama.cpp wants M and \\* layers"),
        ({"hybrid_override_pattern": "M*-", "use_bias": True}, "use_bias=True cannot be exported"),
        ({"hybrid_override_pattern": "M*E", "n_group": 2}, "n_group=2 cannot be exported"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    """Guards a process that llama.cpp aborts, or grouped routing that it leaves out in silence."""
    with pytest.raises(ValueError, match=message):
        export_gguf(fresh_model(**changes), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"old")
    unigram = as_tokenizer({"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0})
    with pytest.raises(ValueError, match="'Unigram' cannot be exported to GGUF; only BPE"):
        export_gguf(dense(), file, tokenizer=unigram)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="is a folder; name the file"):
        export_gguf(dense(), tmp_path)
    with pytest.raises(ValueError, match="'int4' is not a precision of a GGUF file; use one of"):
        export_gguf(dense(), file, dtype="int4")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="cannot be written"):
        export_gguf(dense(), file / "inside.gguf")


def test_without_gguf_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[bench\]'"):
        export_gguf(dense(), tmp_path / "a.gguf")


def test_convert_takes_the_tokenizer_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a file that llama.cpp can only be driven with token ids."""
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=300)
    size = tokenizer.vocab_size + 2
    model = fresh_model(hybrid_override_pattern="M*-", vocab_size=size, eos_token_id=[2, 7])
    save_two_towers(model, tmp_path / "model", extra_files=tokenizer.files(), dtype=torch.bfloat16)
    file = tmp_path / "new" / "a.gguf"
    options = ConvertOptions(source=str(tmp_path / "model"), target=str(file), to="gguf")
    assert run_convert(options) == 0
    assert "a.gguf: written in the gguf layout" in capsys.readouterr().out
    assert metadata(file, "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16  # as it was
    tokens = metadata(file, "tokenizer.ggml.tokens")
    assert tokens[:4] == ["<pad>", "<bos>", "<eos>", "<mask>"]
    assert tokens[-2:] == [f"[unused {size - 2}]", f"[unused {size - 1}]"]
    types = metadata(file, "tokenizer.ggml.token_type")
    assert types[:5] == [3, 3, 3, 3, 1] and types[-2:] == [5, 5]
    merges = json.loads(tokenizer.files()["tokenizer.json"])["model"]["merges"]
    assert metadata(file, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert metadata(file, "tokenizer.ggml.pre") == "smollm"
    assert metadata(file, "tokenizer.ggml.add_bos_token") is True
    ends = [metadata(file, f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    assert ends == [2, 7]


def as_tokenizer(model: dict[str, object], **parts: object) -> Tokenizer:
    content = {"version": "1.0", "decoder": BYTE_LEVEL, "model": model, **parts}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


def bpe(last: int = 5, **parts: object) -> Tokenizer:
    return as_tokenizer({"type": "BPE", "vocab": {"a": 4, "b": last}, "merges": []}, **parts)


def test_a_vocabulary_that_is_larger_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="holds token id 41 but the model has vocab_size=41"):
        read_vocabulary(tiny_config(), bpe(last=41))
    found = read_vocabulary(tiny_config(vocab_size=42), bpe(last=41))
    assert found.tokens[41] == "b" and found.types[41] == 1
    assert found.tokens[5] == "[unused 5]" and found.types[5] == 5


def test_an_unknown_way_of_splitting_text_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Guards prompts that llama.cpp silently splits in another way."""
    assert read_vocabulary(tiny_config(), bpe(pre_tokenizer=BYTE_LEVEL)).split == "gpt-2"
    assert not caplog.records
    other = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTE_LEVEL]}
    assert read_vocabulary(tiny_config(), bpe(pre_tokenizer=other)).split == "default"
    assert "text prompts may be split otherwise" in caplog.text


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_and_the_use_of_bos_go_along(tmp_path: Path, file: str) -> None:
    """Guards a chat in llama.cpp by a format of its own, or with a bos that the model never saw."""
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=300).with_roles({}, adds_bos=False)
    files = tokenizer.files()
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": "{{ messages }}"}
    if file == "chat_template.jinja":  # wins, as in transformers
        files[file], config["chat_template"] = b"{{ messages }}", "{{ older }}"
    files["tokenizer_config.json"] = json.dumps(config).encode()
    model = fresh_model(hybrid_override_pattern="M*-", vocab_size=tokenizer.vocab_size)
    save_two_towers(model, tmp_path / "model", extra_files=files)
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf")
    assert metadata(tmp_path / "a.gguf", "tokenizer.chat_template") == "{{ messages }}"
    assert metadata(tmp_path / "a.gguf", "tokenizer.ggml.add_bos_token") is False


def test_a_model_without_an_end_token_names_the_mask() -> None:
    """llama.cpp would take token 11 for the end."""
    assert read_vocabulary(tiny_config(eos_token_id=None), None).special["eos"] == 3
    with pytest.raises(ValueError, match="GGUF has three end tokens"):
        read_vocabulary(tiny_config(eos_token_id=[4, 5, 6, 7]), None)


def test_the_tokenizers_end_comes_first() -> None:
    """Silent failure: a chat template there ends its turns with <|end_of_text|>, not <|eot_id|>,
    because config.json lists that one first.
    """
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=300)  # its end is 2
    config = tiny_config(vocab_size=tokenizer.vocab_size, eos_token_id=[5, 2, 4])
    special = read_vocabulary(config, tokenizer).special
    assert [special[role] for role in ("eos", "eot", "eom")] == [2, 5, 4]
    assert read_vocabulary(config, None).special["eos"] == 5


def test_options_of_other_layouts_have_no_8_bits() -> None:
    with pytest.raises(ValueError, match="q8_0 exists in GGUF files only, not with to=backbone"):
        ConvertOptions(source="a", target="b", to="backbone", dtype="q8_0")


def test_a_folder_is_not_named_like_a_file() -> None:
    """Guards a folder m.gguf that no program can load, where --to gguf was left out."""
    with pytest.raises(ValueError, match="give --to gguf, or another name"):
        ConvertOptions(source="a", target="m.GGUF")
