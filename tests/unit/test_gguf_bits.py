"""`quantization=gguf`: native passes over the matrices of a GGUF file in the bits that it has."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_adapt
from packed_groups import unpacked
from tiny_gguf import Kind, Tensor, blocks, dequantize, quantize, rewrite
from tiny_models import prompts_of, random_ids, random_model
from twotower import GenerateOptions, accelerate, generate, load_model
from twotower.adapt.features import find_places, write_part
from twotower.adapt.options import StepOptions, ThinOptions
from twotower.adapt.run import first_denoiser, reads_of
from twotower.adapt.training import Trainer
from twotower.checkpoint import load_checkpoint
from twotower.checkpoint.denoiser import save_denoiser
from twotower.checkpoint.gguf import export_gguf
from twotower.cli.bench import BenchOptions, _compared
from twotower.families import config_from_dict
from twotower.kernels.quantised import BLOCK_TYPES, Blocks
from twotower.loading import Placement, load, settled_quantization
from twotower.native import costs, library
from twotower.native.backend import NativeBackend
from twotower.native.packing import Packed

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

SIZES: dict[str, object] = tiny_adapt.LLAMA | {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "head_dim": 64,
    "vocab_size": 300, "num_hidden_layers": 2, "tie_word_embeddings": True,
}  # fmt: skip
MIXED = {"ffn_down": "Q5_0", "attn_v": "Q8_0", "token_embd": "Q8_0", "attn_q": "F16"}


def settled(placement: Placement) -> str:
    return settled_quantization(placement, placement.find())


class InFile:
    """A matrix that is read as a file has it."""

    stored_bits = None

    def __init__(self, found: Blocks) -> None:
        self._found = found

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Blocks:
        return self._found

    def value(self, part: str) -> torch.Tensor:
        raise AssertionError("packing asks for blocks alone")


def written(folder: Path, kinds: dict[str, str], usual: str = "Q4_1", **changes: Any) -> Path:
    """A Llama whose matrices have these types, by a part of their names."""
    export_gguf(random_model(config_from_dict(SIZES | changes)), folder / "plain.gguf")

    def each(tensor: Tensor) -> list[Tensor]:
        name, data, _ = tensor
        if data.ndim == 1:
            return [tensor]
        kind = Kind[next((kinds[part] for part in kinds if part in name), usual)]
        return [(name, quantize(data, kind), kind)]

    rewrite(folder / "plain.gguf", folder / "m.gguf", each=each)
    return folder / "m.gguf"


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_type_is_packed_as_its_numbers_are(kind: str, bits: Any) -> None:
    """Silent failure: a type is read with another one's layout, and the model writes another text.
    The gguf package's numbers, rounded, lie at every place; those of 4 bits are the type's own."""
    stored = blocks((40, 768), Kind[kind], seed=3)
    values = torch.from_numpy(dequantize(stored, Kind[kind]))
    own = InFile(Blocks(torch.from_numpy(stored), kind, 768))
    found = Packed({"": values.to("meta")}, {"": bits}, {"": own})
    known = Packed({"": values}, {"": bits})
    if bits == 4:
        kept, rounded = (unpacked(one, values.shape).values() for one in (found, known))
        if kind in ("Q4_0", "Q4_1"):
            assert torch.equal(kept, values)
        elif kind == "Q4_K":  # a group's scale is a product, rounded to half precision
            assert (kept - values).abs().max() < values.abs().max() / 1000
            assert (kept - values).norm() < (rounded - values).norm() / 20
        else:
            assert torch.allclose(kept, rounded)
    else:
        memory = [ctypes.string_at(one.addresses[""], one.num_bytes) for one in (found, known)]
        assert memory[0] == memory[1]


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_file_keeps_its_bits(tmp_path: Path, is_tied: bool) -> None:
    """Guards a file of several types: what has 4 bits has 4, what has more is not rounded to 4,
    what has full precision keeps it, and embeddings are the file's own bytes."""
    file = written(tmp_path, MIXED, tie_word_embeddings=is_tied)
    model, whole = load_model(file, quantization="gguf"), load_checkpoint(file, towers="context")
    assert model.backend.quantization == "gguf"
    tower = "context_tower.layers"
    bits = {name: one.stored_bits for name, one in model.unread.items()}
    assert bits[f"{tower}.0.mixer.k_proj.weight"] == 4
    assert bits[f"{tower}.0.mixer.v_proj.weight"] == 8
    assert f"{tower}.0.mixer.q_proj.weight" not in bits
    assert model.get_parameter(f"{tower}.0.mixer.q_proj.weight").dtype == torch.float16
    assert model.get_parameter("context_tower.embeddings.weight").is_meta
    tokens = random_ids(2, 40)
    found, known = (one.next_logits(one.prefill(tokens)) for one in (model, whole))
    assert (found - known).norm() < 0.03 * known.norm()
    rounded = accelerate(load_checkpoint(file, towers="context"), "native", "int4")
    other = rounded.next_logits(rounded.prefill(tokens))
    assert (found - known).norm() < (other - known).norm() / 2
    o = GenerateOptions(max_new_tokens=24, mode="ar", temperature=0.0)
    texts = [generate(model, prompts_of([9, 30]), o), generate(model, prompts_of([9, 30]), o)]
    assert texts[0] == texts[1]
    assert dict(model.values()).keys() == whole.state_dict().keys()
    for name, value in model.values():
        assert torch.equal(value.float(), whole.state_dict()[name]), name


def test_auto_keeps_the_bits_for_who_only_decodes(tmp_path: Path) -> None:
    """Guards defaults: a file of 4 bits that takes 32 in memory, and scores of rounded weights."""
    file = str(written(tmp_path, {}))
    assert load(Placement(model=file), only_decodes=True).model.backend.quantization == "gguf"
    assert load(Placement(model=file)).model.backend.quantization == "none"
    for changes in ({"dtype": "float32"}, {"backend": "eager"}, {"quantization": "none"}):
        assert settled(Placement(model=file, **changes)) == "none"  # type: ignore[arg-type]
    export_gguf(load_checkpoint(file, towers="context"), tmp_path / "f.gguf", dtype="float16")
    assert settled(Placement(model=str(tmp_path / "f.gguf"))) == "none"
    assert settled(Placement()) == "none"
    apart = Placement(model=file, device="cpu", denoiser_device="cuda")
    assert settled(apart) == "none"  # no native passes there
    for backend, expected in (("auto", "gguf"), ("eager", "none,int8,int4"), ("native", "gguf")):
        options = BenchOptions(model=file, prompts=(tmp_path,), backend=backend)
        assert ",".join(_compared(options, is_contest=True)[1]) == expected


@pytest.mark.parametrize("draft_vocab", [0, 40])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_denoiser_learns_beside_a_file(tmp_path: Path, is_tied: bool, draft_vocab: int) -> None:
    """Guards `adapt` on such a file: embeddings that stay in it had no values to learn from. The
    steps of a new and of an earlier denoiser are those beside the same weights in memory."""
    file = written(tmp_path, MIXED, tie_word_embeddings=is_tied)
    models = load_model(file, quantization="gguf"), load_checkpoint(file, towers="context").float()
    shape = ThinOptions(layers=1, block_size=4, draft_vocab=draft_vocab, bigram_rank=2)
    earlier = ThinOptions(denoiser=str(tmp_path / "d"))
    reads = reads_of(models[0].config, shape)
    write_part(models[1], tiny_adapt.answers(9), reads, tmp_path / "part-00000.safetensors")
    places = find_places(tmp_path)
    for thin in (shape, earlier):
        losses = []
        for model in models:
            made = first_denoiser(model, thin, 0)
            trainer = Trainer(made, tiny_adapt.features_of(made), StepOptions(warmup_steps=1))
            losses.append([trainer.take_step(places, 0.0) for _ in range(2)])
        assert losses[0] == losses[1]
        save_denoiser(made, tmp_path / "d", "m")


@pytest.mark.parametrize("draft_vocab", [0, 40])
@pytest.mark.parametrize("is_tied", [True, False])
def test_what_a_denoiser_shares_has_values(tmp_path: Path, is_tied: bool, draft_vocab: int) -> None:
    """Guards `generate --output`, which knows a run by its weights: it ended with a defect."""
    file = written(tmp_path, MIXED, tie_word_embeddings=is_tied)
    shape = ThinOptions(layers=1, block_size=4, draft_vocab=draft_vocab)
    whole = first_denoiser(load_checkpoint(file, towers="context").float(), shape, 0)
    save_denoiser(whole, tmp_path / "d", "m")
    found = load_model(file, denoiser=tmp_path / "d", quantization="gguf")
    known = load_model(file, denoiser=tmp_path / "d", quantization="none")
    for (name, own), (_, other) in zip(found.values(), known.values(), strict=True):
        assert torch.equal(own, other), name


def test_pass_costs_are_those_of_the_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards drafts: those of a file in 8 bits would be as long as pays in 4, from then on."""
    asked: list[str] = []
    monkeypatch.setattr(
        costs, "pass_costs", lambda run, kind, identity, *rest: asked.append(identity)
    )
    for usual in ("Q4_1", "Q8_0"):
        model = load_model(written(tmp_path, {}, usual), quantization="gguf")
        assert isinstance(model.backend, NativeBackend)
        assert model.backend.pass_costs is None  # asked
    assert len(set(asked)) == 2


def test_a_head_in_half_precision_stays_exact(tmp_path: Path) -> None:
    """Guards docs/gguf.md: F16 matrices of such a file are taken as they are, the head, too."""
    file = written(tmp_path, {"output": "F16"}, tie_word_embeddings=False)
    hidden = torch.randn(1, 3, 256, generator=torch.Generator().manual_seed(0))
    model = load_model(file, quantization="gguf")
    whole = model.values_of("context_lm_head")["weight"].float()
    torch.testing.assert_close(model.context_head(hidden), hidden @ whole.T)
    assert "context_lm_head.weight" not in model.unread
    other = load_model(file, quantization="int8")
    with pytest.raises(ValueError, match="weights were not loaded with quantization=gguf"):
        accelerate(other, "native", "gguf")


def test_what_has_no_bits_of_its_own_is_refused(tmp_path: Path) -> None:
    """Guards a name that would mean full precision, or 8 bits, where there are no others."""
    line = "^quantization=gguf: .* is no GGUF file with quantised matrices; use int8, int4 or none$"
    export_gguf(random_model(config_from_dict(SIZES)), tmp_path / "f.gguf", dtype="float16")
    for model in (None, tmp_path / "f.gguf"):
        with pytest.raises(ValueError, match=line):
            load_model(model, quantization="gguf")
    with pytest.raises(ValueError, match=r"^quantization=gguf: these weights were not loaded"):
        accelerate(random_model(config_from_dict(SIZES)), "native", "gguf")
    file = written(tmp_path, {})
    with pytest.raises(ValueError, match=r"^quantization=gguf: eager passes run weights as"):
        load_model(file, quantization="gguf", backend="eager")


def test_a_scale_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    """Guards a damaged file: its text would be noise of one layer."""

    def damaged(tensor: Tensor) -> list[Tensor]:
        name, data, kind = tensor
        if "ffn_up" in name:
            data = data.copy()
            data.reshape(-1)[:2] = 255
        return [(name, data, kind)]

    rewrite(written(tmp_path, {}), tmp_path / "n.gguf", each=damaged)
    with pytest.raises(ValueError, match=r"ffn_up\.weight holds NaN or infinite values"):
        load_model(tmp_path / "n.gguf", quantization="gguf")
