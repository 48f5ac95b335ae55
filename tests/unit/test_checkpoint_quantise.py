"""Quantised checkpoints: written, read, described, refused; and what they take in memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_quantised import SCHEMES, groupable_model
from twotower import TwoTower
from twotower.checkpoint import (
    convert,
    convert_to_gguf,
    describe,
    load_checkpoint,
    load_quantised,
    save_backbone,
    save_two_towers,
)
from twotower.checkpoint.empty import count_parameters
from twotower.checkpoint.quantize import read_scheme
from twotower.cli.convert import ConvertOptions
from twotower.cli.inspect import InspectOptions
from twotower.cli.inspect import run as run_inspect
from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.model.initialise import randomise
from twotower.model.precision import Scheme, scheme_of

Edit = Callable[[dict[str, Tensor], dict[str, object]], object]
QDATA = "context_tower.layers.2.mixer.experts.1.up_proj.weight.qdata"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "model"
    save_two_towers(
        groupable_model(), folder, dtype=torch.bfloat16, extra_files={"note.md": b"kept"}
    )
    return folder


@pytest.fixture(scope="module")
def quantised(full: Path) -> dict[str, Path]:
    """The same checkpoint by every scheme."""
    folders = {name: full.parent / name for name in SCHEMES}
    for name, folder in folders.items():
        convert(full, folder, "released", scheme=SCHEMES[name])
    return folders


def edited(source: Path, folder: Path, edit: Edit) -> Path:
    """A copy with changed tensors and configuration."""
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    edit(tensors, config)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(a: TwoTower, b: TwoTower) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(
        torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x
    )


def message(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_saved_is_loaded_bit_for_bit(
    full: Path, quantised: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Guards packed numbers that pass through a float, and a second generation of rounding."""
    made = load_quantised(full, SCHEMES[name])
    assert same(load_checkpoint(quantised[name], dtype=None), made)
    save_two_towers(load_checkpoint(quantised[name], dtype=None), tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (quantised[name] / file).read_bytes()
    assert (quantised[name] / "note.md").read_bytes() == b"kept"


@pytest.mark.parametrize("name", SCHEMES)
def test_the_scheme_is_in_the_configuration_and_not_in_the_path(
    quantised: dict[str, Path], name: str, tmp_path: Path
) -> None:
    assert read_scheme(quantised[name]) == SCHEMES[name]
    elsewhere = edited(quantised[name], tmp_path / "float32", lambda t, c: None)
    assert scheme_of(load_checkpoint(elsewhere)) == SCHEMES[name]


def test_full_precision_weights_keep_their_bits(full: Path, quantised: dict[str, Path]) -> None:
    """Guards embeddings or routers that are rounded on the way."""
    before, after = (load_file(p / "model.safetensors") for p in (full, quantised["int4"]))
    unchanged = set(before) & set(after)
    assert all(torch.equal(before[n], after[n]) for n in unchanged)
    assert {"context_tower.embeddings.weight", "t_embedder.mlp.0.weight"} <= unchanged
    packed = set(after) - unchanged
    assert {n.rpartition(".")[2] for n in packed} == {"qdata", "scale", "zero"}
    assert {n.rpartition(".")[0] for n in packed} == set(before) - unchanged


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_near_those_of_the_wide_model(
    full: Path, quantised: dict[str, Path], name: str
) -> None:
    """Guards a scheme that runs and computes another model: random weights would differ by 1.4."""
    ids, block, t = torch.arange(4, 24).view(2, 10), torch.full((2, 4), 3), torch.ones(2)
    found = []
    for path in (full, quantised[name]):
        model = load_checkpoint(path)
        cache = model.prefill(ids)
        found.append((model.next_logits(cache), model.denoise(block, cache.view(), t)))
    for expected, logits in zip(*found, strict=True):
        off = (logits - expected).norm() / expected.norm()
        assert 0.0 < off < (0.6 if "int4" in name else 0.06)


def test_a_backbone_is_quantised_and_fills_both_towers(tmp_path: Path) -> None:
    model = groupable_model()
    save_backbone(model, tmp_path / "backbone")
    convert(tmp_path / "backbone", tmp_path / "small", "backbone", scheme=SCHEMES["int8"])
    both = load_checkpoint(tmp_path / "small")
    state = both.state_dict()
    assert "denoiser_tower.layers.0.mixer.in_proj.weight.qdata" in state
    for name in [n for n in state if n.startswith("denoiser_tower.")]:
        assert torch.equal(state[name], state[name.replace("denoiser_", "context_")]), name
    assert torch.equal(state["lm_head.weight.qdata"], state["context_lm_head.weight.qdata"])
    assert same(load_quantised(tmp_path / "backbone", SCHEMES["int8"]), both)
    alone = load_checkpoint(tmp_path / "small", towers="context")
    assert alone.denoiser_tower is None and scheme_of(alone) == SCHEMES["int8"]


def test_stacked_experts_are_quantised_one_by_one(full: Path, tmp_path: Path) -> None:
    """Guards a scale shared by all experts of a layer."""

    def stack(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
        stem = "context_tower.layers.2.mixer.experts"
        for side in ("up_proj", "down_proj"):
            parts = [tensors.pop(f"{stem}.{e}.{side}.weight") for e in range(4)]
            tensors[f"{stem}.{side}"] = torch.stack(parts)

    path = edited(full, tmp_path / "stacked", stack)
    assert same(load_quantised(path, SCHEMES["int4"]), load_quantised(full, SCHEMES["int4"]))


BAD: dict[str, tuple[Edit, str]] = {
    "no scheme": (lambda t, c: c.pop("quantization_config"), "unexpected: "),
    "another scheme": (
        lambda t, c: c.update(quantization_config={"quant_method": "twotower", "weights": "int8"}),
        "misshapen: ",
    ),
    "other groups": (
        lambda t, c: c["quantization_config"].update(group_size=64),  # type: ignore[attr-defined]
        "misshapen: ",
    ),
    "unknown bits": (
        lambda t, c: c["quantization_config"].update(weights="int2"),  # type: ignore[attr-defined]
        "config.json: quantization_config: weights='int2' is unknown",
    ),
    "unknown key": (
        lambda t, c: c["quantization_config"].update(outliers=3),  # type: ignore[attr-defined]
        "'outliers' is unknown; allowed are weights, group_size, activations",
    ),
    "no weights key": (
        lambda t, c: c["quantization_config"].pop("weights"),  # type: ignore[attr-defined]
        "weights is missing",
    ),
    "another library's": (
        lambda t, c: c["quantization_config"].update(quant_method="fp8"),  # type: ignore[attr-defined]
        "quant_method='fp8' is not supported, only 'twotower'",
    ),
    "no object": (lambda t, c: c.update(quantization_config="int4"), "must be an object"),
    "a lost scale": (
        lambda t, c: t.pop(QDATA.replace("qdata", "scale")),
        f"1 missing: {QDATA.replace('qdata', 'scale')}",
    ),
    "signed bytes": (
        lambda t, c: t.update({QDATA: t[QDATA].view(torch.int8)}),
        f"1 packed otherwise: {QDATA} (I8)",
    ),
    "whole numbers as floats": (
        lambda t, c: t.update({QDATA: t[QDATA].float()}),
        f"1 packed otherwise: {QDATA} (F32)",
    ),
    "a scale that is NaN": (
        lambda t, c: t[QDATA.replace("qdata", "scale")].fill_(float("nan")),
        "scale holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_or_damaged_scheme_is_one_line(
    quantised: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    """Guards against garbage text from numbers read by another rule than they were written by."""
    edit, expected = BAD[fault]
    assert expected in message(edited(quantised["int4"], tmp_path / "bad", edit))


def test_nan_is_found_before_it_becomes_a_number(full: Path, tmp_path: Path) -> None:
    name = QDATA.removesuffix(".qdata")
    path = edited(full, tmp_path / "nan", lambda t, c: t[name][0, 0].fill_(float("nan")))
    with pytest.raises(ValueError, match="holds NaN or infinite"):
        load_quantised(path, SCHEMES["int8"])


def test_what_needs_full_precision_says_so(quantised: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is quantised already"):
        load_quantised(quantised["int8"], SCHEMES["int4"])
    with pytest.raises(ValueError, match="the transformers layout needs full-precision weights"):
        convert(quantised["int8"], tmp_path / "t", "transformers")
    with pytest.raises(ValueError, match="GGUF needs full-precision weights"):
        convert_to_gguf(quantised["int8"], tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"group_size": 32}, "group_size: no effect without quantization=int4"),
        ({"activations": "int8"}, "activations: no effect without"),
        ({"quantization": "int8", "group_size": 32}, "int8 weights have no groups"),
        ({"quantization": "int4", "to": "gguf"}, "needs to=released or backbone, not gguf"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ConvertOptions(source="a", target="b", **flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEMES)
def test_inspect_tells_precision_and_bytes(
    quantised: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = describe(quantised[name])
    assert record.files is not None and record.files.problem is None
    assert record.precision is not None and record.precision.scheme == SCHEMES[name]
    kinds = record.precision.weights
    assert sum(kind["parameters"] for kind in kinds.values()) == record.total
    header = 8 + int.from_bytes((quantised[name] / "model.safetensors").read_bytes()[:8], "little")
    assert sum(kind["num_bytes"] for kind in kinds.values()) == record.files.num_bytes - header
    assert ("4 bits" in kinds) == ("int4" in name) and "8 bits" in kinds
    run_inspect(InspectOptions(path=str(quantised[name])))
    assert f"{SCHEMES[name].weights} weights" in capsys.readouterr().out
    run_inspect(InspectOptions(path=str(quantised[name]), json=True))
    shown = json.loads(capsys.readouterr().out)["precision"]
    assert shown["scheme"]["group_size"] == SCHEMES[name].group_size


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_forecast_is_what_the_files_then_hold(
    full: Path, quantised: dict[str, Path], name: str
) -> None:
    """Guards the memory table against another rule than the one that packs."""
    precision = describe(quantised[name]).precision
    assert precision is not None
    taken = sum(kind["num_bytes"] for kind in precision.weights.values())
    assert describe(full).weight_bytes[name] == taken
    assert describe(full).precision is None


def test_parameters_are_counted_as_weights(full: Path, quantised: dict[str, Path]) -> None:
    counted = {count_parameters(load_checkpoint(path)) for path in (full, *quantised.values())}
    assert counted == {sum(p.numel() for p in load_checkpoint(full).parameters())}


MEMORY_PROBE = """
import sys, torch
from twotower.checkpoint import load_checkpoint, load_quantised
from twotower.model.precision import Scheme

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def load(path):
    if sys.argv[3] == "stored":
        return load_checkpoint(path, dtype=None)
    return load_quantised(path, Scheme(weights=sys.argv[3]))

load(sys.argv[2])  # what only the first load needs
before = peak_bytes()
model = load(sys.argv[1])
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(peak_bytes() - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_about_the_quantised_size(full: Path, quantised: dict[str, Path]) -> None:
    """Guards a full copy, when a checkpoint is loaded and when it is quantised: a model that fits
    in 4 bits only could not be."""
    values = config_to_dict(read_config(full))
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 32}
    model = TwoTower(config_from_dict(values | sizes))
    randomise(model, 0)
    big = full.parent / "big"
    save_two_towers(model, big, dtype=torch.bfloat16)
    convert(big, full.parent / "big4", "released", scheme=Scheme(weights="int4"))
    wide_bytes = (big / "model.safetensors").stat().st_size
    assert wide_bytes > 70_000_000
    for path, first, how in (
        (full.parent / "big4", quantised["int4"], "stored"),
        (big, full, "int4"),
    ):
        command = [sys.executable, "-c", MEMORY_PROBE, str(path), str(first), how]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        growth, size = map(int, output.split())
        assert size < 0.35 * wide_bytes
        # Pages of the portion of the file that is being read count as well: up to 2^25 elements.
        portion = size if how == "stored" else 2 * 2**25
        assert growth < size + portion + 20_000_000, (how, growth, size)
