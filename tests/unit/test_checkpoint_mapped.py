"""Experts left in their files: the same tokens, no copy in memory, and what is refused."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import fresh_model, prompts_of
from tiny_quantised import SCHEMES, groupable_model
from twotower import TwoTower
from twotower.checkpoint import convert, load_checkpoint, save_backbone, save_two_towers
from twotower.checkpoint.mapped import _Files
from twotower.engine import GenerateOptions, generate
from twotower.layers.quantised import MappedExperts
from twotower.loading import load_model
from twotower.model.precision import has_mapped_experts

MODES = ("ar", "diffusion", "speculative")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one model in several precisions, in shards."""
    parent = tmp_path_factory.mktemp("experts")
    found = {"bfloat16": parent / "bfloat16", "float32": parent / "float32"}
    for name, folder in found.items():
        dtype = getattr(torch, name)
        save_two_towers(groupable_model(), folder, dtype=dtype, max_shard_bytes=200_000)
    for name in ("int8", "int8-int8", "int4"):
        found[name] = parent / name
        convert(found["float32"], found[name], "released", scheme=SCHEMES[name])
    return found


def tokens(model: TwoTower, mode: str) -> list[list[int]]:
    options = GenerateOptions(mode=mode, max_new_tokens=9, ignore_eos=True)  # type: ignore[arg-type]
    return [list(found.tokens) for found in generate(model, prompts_of([5, 3]), options)]


@pytest.mark.parametrize("name", ["bfloat16", "float32", "int8", "int8-int8", "int4"])
@pytest.mark.parametrize("mode", MODES)
def test_mapped_experts_write_the_same_tokens(
    folders: dict[str, Path], name: str, mode: str
) -> None:
    """Guards an expert that is read from another's place, and a product of another rounding."""
    mapped = load_checkpoint(folders[name], expert_storage="mmap")
    assert has_mapped_experts(mapped)
    assert tokens(mapped, mode) == tokens(load_checkpoint(folders[name]), mode)


@pytest.mark.parametrize("name", ["bfloat16", "int4"])
def test_logits_are_bit_equal(folders: dict[str, Path], name: str) -> None:
    ids = torch.arange(4, 14).unsqueeze(0)
    found = []
    for storage in ("memory", "mmap"):
        model = load_checkpoint(folders[name], expert_storage=storage)  # type: ignore[arg-type]
        found.append(model.next_logits(model.prefill(ids)))
    assert torch.equal(*found)


def test_the_rest_keeps_its_precision(folders: dict[str, Path]) -> None:
    """Guards memory and speed: in float32, for native passes that never come, the rest takes twice
    the memory and each chosen expert is converted at each use."""
    mapped = load_model(folders["bfloat16"], device="cpu", expert_storage="mmap")
    assert mapped.backend.name == "eager"
    assert mapped.context_tower.embeddings.weight.dtype == torch.bfloat16


def test_mapped_experts_take_no_memory_of_their_own(folders: dict[str, Path]) -> None:
    """Guards against a view that has become a copy: by addresses, and by bytes of the rest."""
    model = load_checkpoint(folders["bfloat16"], dtype=None, expert_storage="mmap")
    regions = [
        tuple(int(edge, 16) for edge in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "bfloat16" in line and " r--s " in line  # read only, shared with the page cache
    ]
    experts = [module for module in model.modules() if isinstance(module, MappedExperts)]
    assert len(experts) == 2 and len(regions) > 1
    for module in experts:
        for matrix in (*module.up, *module.down):  # type: ignore[misc]  # lists
            begin = matrix.data_ptr()
            assert any(low <= begin < high for low, high in regions)
    left = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    whole = load_checkpoint(folders["bfloat16"], dtype=None).state_dict()
    of_experts = sum(t.numel() * 2 for n, t in whole.items() if ".experts." in n)
    assert left + of_experts == sum(t.numel() * t.element_size() for t in whole.values())


def test_stacked_experts_and_a_backbone_are_mapped_too(tmp_path: Path) -> None:
    save_backbone(groupable_model(), tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    stem = "backbone.layers.2.mixer.experts"
    for side in ("up_proj", "down_proj"):
        parts = [tensors.pop(f"{stem}.{e}.{side}.weight") for e in range(4)]
        tensors[f"{stem}.{side}"] = torch.stack(parts)
    (tmp_path / "two").mkdir()
    save_file(tensors, tmp_path / "two" / "model.safetensors")
    config = (tmp_path / "one" / "config.json").read_bytes()
    (tmp_path / "two" / "config.json").write_bytes(config)
    expected = tokens(load_checkpoint(tmp_path / "one"), "diffusion")
    for folder in ("one", "two"):
        assert (
            tokens(load_checkpoint(tmp_path / folder, expert_storage="mmap"), "diffusion")
            == expected
        )


def test_what_cannot_be_mapped_is_one_line(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"current_accelerator": lambda **_: torch.device("xpu"), "device_count": lambda: 1}
    for name, answer in found.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    dense = tmp_path / "dense"
    save_two_towers(fresh_model(hybrid_override_pattern="M*-", num_hidden_layers=3), dense)
    with pytest.raises(ValueError, match="this model has no experts"):
        load_checkpoint(dense, expert_storage="mmap")
    with pytest.raises(ValueError, match="expert_storage='disk' is unknown"):
        load_checkpoint(folders["int8"], expert_storage="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs both towers on the CPU, not on 'xpu'"):
        load_checkpoint(folders["int8"], denoiser_device="xpu", expert_storage="mmap")
    with pytest.raises(ValueError, match="activations=int8 needs both towers on the CPU"):
        load_checkpoint(folders["int8-int8"], context_device="xpu")
    mapped = load_checkpoint(folders["int8"], expert_storage="mmap")
    with pytest.raises(ValueError, match="saving needs the experts in memory"):
        save_two_towers(mapped, tmp_path / "copy")


def test_a_tensor_at_an_odd_place_is_refused(tmp_path: Path) -> None:
    """Guards against numbers made of the halves of two others."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.ones(2)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"[0,8]", b"[3,11]").replace(b"[8,11]", b"[0,3]")
    assert len(header) >= length
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    from twotower.checkpoint.files import Entry

    with pytest.raises(ValueError, match="b does not begin where F32 can be mapped"):
        _Files().view(Entry(path, "b", (2,), "F32"))


def test_a_replaced_file_keeps_its_old_readers(folders: dict[str, Path], tmp_path: Path) -> None:
    """Guards a mapping that follows the name of its file to another model's weights."""
    save_two_towers(groupable_model(), tmp_path / "model")
    mapped = load_checkpoint(tmp_path / "model", expert_storage="mmap")
    before = tokens(mapped, "ar")
    save_two_towers(fresh_model(7, **{"hidden_size": 64}), tmp_path / "model")
    assert mmap.PAGESIZE and tokens(mapped, "ar") == before
