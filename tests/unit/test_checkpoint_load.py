"""Loading: every layout and dtype gives the same model, every damaged checkpoint one clear line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.checkpoint import fill, generation_defaults, load_checkpoint, resolve, save_two_towers
from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.loading import Placement, load
from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower

GOLDEN = Path(__file__).parents[1] / "golden"
Edit = Callable[[dict[str, Tensor]], object]


def edited(folder: Path, edit: Edit, case: str = "case_03", **config: object) -> Path:
    """A copy of a recorded checkpoint with changed tensors and configuration."""
    folder.mkdir(exist_ok=True)
    tensors = load_file(GOLDEN / case / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((GOLDEN / case / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def as_backbone(tensors: dict[str, Tensor], prefix: str = "backbone.") -> None:
    found = dict(tensors)
    tensors.clear()
    tensors["lm_head.weight"] = found["context_lm_head.weight"]
    for name, tensor in found.items():
        if name.startswith("context_tower."):
            tensors[name.replace("context_tower.", prefix)] = tensor


def message(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a: TwoTower, b: TwoTower, prefix: str = "") -> bool:
    x, y = a.state_dict(), b.state_dict()
    keys = [name for name in x if name.startswith(prefix)]
    return bool(keys) and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in keys)


def test_every_parameter_holds_the_files_value() -> None:
    """Guards against tensors left uninitialised: memory that happens to be zero looks trained."""
    model = load_checkpoint(GOLDEN / "case_03", dtype=None)
    assert not model.training
    tensors = load_file(GOLDEN / "case_03" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        if ".experts." in name:
            stem, projection = name.rsplit(".", 1)
            found = torch.stack([tensors[f"{stem}.{e}.{projection}.weight"] for e in range(8)])
        else:
            found = tensors[name]
        assert torch.equal(value, found.to(value.dtype)), name


@pytest.mark.parametrize("portion", [1, 9_728, 1 << 40])
def test_any_portions_of_a_file_are_all_of_it(
    portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards files whose last portion is full with their last tensor, as SmolLM2's in 4 bits is:
    loading went on to an empty one and failed."""
    expected = load_checkpoint(GOLDEN / "case_02")
    monkeypatch.setattr(fill, "_PORTION", portion)
    assert same(load_checkpoint(GOLDEN / "case_02"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_but_routers_takes_the_dtype(dtype: torch.dtype) -> None:
    """Guards against routers in bfloat16: other experts are chosen and only quality shows it."""
    model = load_checkpoint(GOLDEN / "case_03", dtype=dtype)
    for name, value in model.state_dict().items():
        assert value.dtype == (torch.float32 if ".gate." in name else dtype), name


def test_the_context_alone_reads_no_denoiser(tmp_path: Path) -> None:
    """Guards against AR decoding that needs twice its memory, or a denoiser that is not there."""
    whole = load_checkpoint(GOLDEN / "case_03")
    alone = load_checkpoint(GOLDEN / "case_03", towers="context")
    assert alone.denoiser_tower is None and same(alone, whole)
    parts = ("denoiser_tower", "lm_head", "t_", "scale")
    cut = edited(tmp_path, lambda t: [t.pop(n) for n in list(t) if n.startswith(parts)])
    assert same(load_checkpoint(cut, towers="context"), alone)
    assert "missing: " in message(cut)


@pytest.mark.parametrize("prefix", ["backbone.", "model.", ""])
def test_a_backbone_fills_both_towers_and_starts_unconditioned(tmp_path: Path, prefix: str) -> None:
    """Guards against an initial gate of 0 or a shift: training would start from another model."""
    path = edited(tmp_path, lambda tensors: as_backbone(tensors, prefix))
    model, released = load_checkpoint(path), load_checkpoint(GOLDEN / "case_03")
    assert same(model, released, "context")
    state = model.state_dict()
    for name in [n for n in state if n.startswith("denoiser_tower.")]:
        assert torch.equal(state[name], state[name.replace("denoiser_", "context_")]), name
    assert torch.equal(model.lm_head.weight, model.context_lm_head.weight)
    ids = torch.tensor([[1, 5, 9, 3, 3]])
    view = model.prefill(ids).view()
    conditioned = model.denoise(ids, view, torch.tensor([0.7]))
    assert torch.equal(conditioned, model.denoise(ids, view, None))


def test_stacked_experts_are_accepted(tmp_path: Path) -> None:
    def stack(tensors: dict[str, Tensor]) -> None:
        stem = "context_tower.layers.0.mixer.experts"
        for projection in ("up_proj", "down_proj"):
            parts = [tensors.pop(f"{stem}.{e}.{projection}.weight") for e in range(8)]
            tensors[f"{stem}.{projection}"] = torch.stack(parts)

    assert same(load_checkpoint(edited(tmp_path, stack)), load_checkpoint(GOLDEN / "case_03"))


def test_tied_heads_may_be_left_out_and_stay_tied(tmp_path: Path) -> None:
    """Guards against two copies that drift apart in training."""

    def drop_heads(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"], tensors["context_lm_head.weight"]

    model = load_checkpoint(edited(tmp_path, drop_heads, tie_word_embeddings=True))
    assert model.context_lm_head.weight is model.context_tower.embeddings.weight
    assert model.denoiser_tower is not None
    assert model.lm_head.weight is model.denoiser_tower.embeddings.weight
    assert torch.isfinite(model.context_logits(torch.tensor([[1, 2]]))).all()


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_are_left_out_are_the_tied_head_or_missing(
    tmp_path: Path, tied: bool
) -> None:
    """Guards a traceback of a name: the dtype was taken from tensors that are not there."""

    def drop_embeddings(tensors: dict[str, Tensor]) -> None:
        del tensors["context_tower.embeddings.weight"], tensors["denoiser_tower.embeddings.weight"]

    folder = edited(tmp_path, drop_embeddings, tie_word_embeddings=tied)
    if not tied:
        assert "2 missing: context_tower.embeddings.weight, denoiser_" in message(folder)
        return
    model, whole = load_checkpoint(folder), load_checkpoint(GOLDEN / "case_03")
    assert model.context_lm_head.weight is model.context_tower.embeddings.weight
    assert torch.equal(model.context_lm_head.weight, whole.context_lm_head.weight)


def test_a_head_of_its_own_is_kept_though_the_configuration_ties_it(tmp_path: Path) -> None:
    """transformers writes such files: its model of this architecture never ties the head."""
    model = load_checkpoint(edited(tmp_path, lambda tensors: None, tie_word_embeddings=True))
    assert not model.config.tie_word_embeddings
    assert same(model, load_checkpoint(GOLDEN / "case_03"))


def test_tensor_faults_are_one_line_that_lists_them(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["extra.weight"] = torch.ones(2)
        tensors["t_block.1.bias"] = torch.ones(5)
        for i in range(5):
            del tensors[f"scale_shift_tables.{i}"]
            tensors[f"context_tower.layers.{i}.norm.scale"] = torch.ones(1)

    text = message(edited(tmp_path, spoil))
    assert "6 missing: lm_head.weight, scale_shift_tables.0" in text
    assert "6 unexpected: " in text and "extra.weight" in text
    assert "1 misshapen: t_block.1.bias [5] instead of [192]" in text


def test_long_lists_are_cut(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda tensors: None, n_routed_experts=16)
    text = message(path)
    assert "32 missing: " in text and "and 24 more" in text and len(text) < 1500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    """Guards against NaN logits, whose argmax is an ordinary token."""
    name = "denoiser_tower.layers.0.mixer.experts.3.up_proj.weight"
    path = edited(tmp_path, lambda tensors: tensors[name][4, 5].fill_(value))
    assert f"{name} holds NaN or infinite values" in message(path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}))
    assert "not in F64, F32, BF16, F16: lm_head.weight (I32)" in message(path)


def test_a_base_model_without_a_head_says_so(tmp_path: Path) -> None:
    """Guards a user who saved by AutoModel against a list of tensors, or a head of nothing."""

    def cut(tensors: dict[str, Tensor]) -> None:
        as_backbone(tensors, "")
        del tensors["lm_head.weight"]

    assert "has no lm_head.weight, and config.json ties no head" in message(edited(tmp_path, cut))


def test_a_tokenizer_with_more_tokens_than_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards fine-tunes that added a [PAD] to the tokenizer alone: they were refused."""
    folder = Path(shutil.copytree(resolve("shipped"), tmp_path / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    size = read_config(folder).vocab_size
    content["added_tokens"].append(content["added_tokens"][0] | {"id": size, "content": "[PAD]"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = load(Placement(model=str(folder), backend="eager"), mode="ar")
    assert found.need_tokenizer().vocab_size == size
    assert "are read as text: ['[PAD]']" in caplog.text


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    """Guards a user of LoRA: nothing told that its folder is half a model."""
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter alone; merge it into its base model" in message(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: (t.clear(), t.update({"h.0.weight": torch.ones(2)})))
    assert "'h.0.weight' are of another model" in message(path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated or not a safetensors file"),
        (lambda f: f.write_bytes(b"no weights"), "truncated or not a safetensors file"),
        (lambda f: f.write_bytes(b""), "truncated or not a safetensors file"),
        (lambda f: f.unlink(), "model-00002-of-00003.safetensors, which is missing"),
    ],
)
def test_a_damaged_shard_is_named(
    tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    for file in (GOLDEN / "case_02").glob("[cm]*"):
        shutil.copyfile(file, tmp_path / file.name)
    damage(tmp_path / "model-00002-of-00003.safetensors")
    text = message(tmp_path)
    assert expected in text and "00002" in text


def test_the_index_decides_between_two_shards(tmp_path: Path) -> None:
    """Guards against a leftover of an older save inside a shard."""
    for file in (GOLDEN / "case_02").glob("[cm]*"):
        shutil.copyfile(file, tmp_path / file.name)
    last = tmp_path / "model-00003-of-00003.safetensors"
    stale = {"context_tower.norm_f.weight": torch.zeros(48)}
    save_file(load_file(last) | stale, last)
    assert same(load_checkpoint(tmp_path), load_checkpoint(GOLDEN / "case_02"))


def copy_shards(folder: Path) -> None:
    for file in (GOLDEN / "case_02").glob("[cm]*"):
        shutil.copyfile(file, folder / file.name)


@pytest.mark.parametrize(
    ("name", "shard"),
    [("context_tower.norm_f.weight", 1), ("context_tower.layers.9.norm.weight", 3)],
)
def test_an_index_of_another_save_is_named(tmp_path: Path, name: str, shard: int) -> None:
    """Guards tensors that are taken from where they lie, and a remedy for config.json."""
    copy_shards(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][name] = f"model-{shard:05d}-of-00003.safetensors"
    file.write_text(json.dumps(index))
    expected = f"index.json: model-{shard:05d}-of-00003.safetensors does not hold {name}; restore"
    assert expected in message(tmp_path)


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    """Guards a model of an older save that silently wins over the one that the index names."""
    copy_shards(tmp_path)
    save_file({"context_tower.norm_f.weight": torch.zeros(48)}, tmp_path / "model.safetensors")
    assert "holds model.safetensors and model.safetensors.index.json, of which" in message(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "gguf_tensors.json").write_text("{}")
    assert "holds gguf_tensors.json and model.safetensors.index.json, of" in message(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_model.BIN", "a.gguf"])
def test_weights_beside_those_that_are_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Guards an adapter, or a newer save, that is left out in silence."""
    copy_shards(tmp_path)
    with caplog.at_level("WARNING", "twotower"):
        load_checkpoint(tmp_path)
        assert not caplog.records
        (tmp_path / name).write_bytes(b"x")
        load_checkpoint(tmp_path)
    (said,) = caplog.messages
    assert f": {name} not read; the weights are model-00001-of-00003.safetensors, " in said


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("{", "not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is not a file name"),
        ('{"weight_map": {"a": 3}}', "is not a file name"),
    ],
)
def test_a_bad_index_is_one_clear_line(tmp_path: Path, index: str, expected: str) -> None:
    shutil.copyfile(GOLDEN / "case_02/config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert expected in message(tmp_path)


def test_places_without_a_checkpoint_are_one_clear_line(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path)
    shutil.copyfile(GOLDEN / "case_03/config.json", tmp_path / "config.json")
    assert "index.json; add the weights" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")  # which is there, and no weights
    assert "; pytorch_model.bin not read: save the model as safetensors" in message(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")  # a shard without its index
    assert "not read: restore model.safetensors.index.json" in message(tmp_path)
    assert "is a file" in message(tmp_path / "config.json")
    assert "is not a file or folder" in message(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"^model: models/tiny.gguf is not a file or folder; give"):
        resolve("models/tiny.gguf")  # which could be a hub id
    with pytest.raises(ValueError, match=r"^nobody/nothing: .*the hub did not give it"):
        resolve("nobody/nothing")


def test_bad_arguments_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.int8 is not supported"):
        load_checkpoint(GOLDEN / "case_03", dtype=torch.int8)
    with pytest.raises(ValueError, match="device='gpu' is unknown"):
        load_checkpoint(GOLDEN / "case_03", context_device="gpu")
    for absent in ("cuda:99", "xpu:99", "meta"):
        with pytest.raises(ValueError, match=f"^denoiser_device='{absent}' is not on this machine"):
            load_checkpoint(GOLDEN / "case_03", denoiser_device=absent)


def test_generation_defaults(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"confidence_threshold": 0.7}')
    assert generation_defaults(tmp_path) == {"confidence_threshold": 0.7}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        generation_defaults(tmp_path)


MEMORY_PROBE = """
import sys, torch
from twotower.checkpoint import load_checkpoint

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

load_checkpoint(sys.argv[2])  # what only the first load needs
before = peak_bytes()
model = load_checkpoint(sys.argv[1], dtype=None)
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_the_model_plus_one_shard(tmp_path: Path) -> None:
    """Guards against a second whole copy: a model that just fits could not be loaded."""
    values = config_to_dict(read_config(GOLDEN / "case_03"))
    config = config_from_dict(values | {"hidden_size": 512, "vocab_size": 16384})
    model = TwoTower(config)
    randomise(model, 0)
    save_two_towers(model, tmp_path / "big", max_shard_bytes=16_000_000, dtype=torch.bfloat16)
    size = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "big"), str(GOLDEN / "case_03")]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    largest = max(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    assert size > 60_000_000
    assert growth < size + largest + 25_000_000, (growth, size, largest)
