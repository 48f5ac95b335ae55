"""Matrices that `--quantization` rounds while they are read: the same numbers, in a fraction of the
memory."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_adapt
from tiny_models import fresh_model, prompts_of, random_model
from tiny_quantised import SCHEMES, SIZES
from twotower import GenerateOptions, TwoTower, generate, memory
from twotower.adapt.features import find_places, write_part
from twotower.adapt.options import StepOptions, ThinOptions
from twotower.adapt.run import first_denoiser
from twotower.adapt.training import Trainer
from twotower.backends import accelerate
from twotower.checkpoint import (
    load_checkpoint,
    load_quantised,
    save_backbone,
    save_two_towers,
)
from twotower.checkpoint.convert import convert
from twotower.checkpoint.denoiser import save_denoiser
from twotower.families import config_from_dict
from twotower.layers.quantised import QuantisedMatrix
from twotower.loading import Placement, load, load_model, save_model
from twotower.model.backend import ContextInput
from twotower.model.eager import EagerBackend
from twotower.model.precision import NATIVE_SCHEMES, Scheme
from twotower.model.thin import sketch
from twotower.native import library
from twotower.native.packing import Packed

INT8 = NATIVE_SCHEMES["int8"]
DENSE = SIZES | {"hybrid_override_pattern": "M*-M*-"}
EXPERTS = SIZES | {"hybrid_override_pattern": "M*E-"}


@pytest.fixture(autouse=True)
def needs_native() -> None:
    try:
        library.library()
    except OSError as error:
        pytest.skip(f"no native library: {error}")


def logits(model: TwoTower) -> list[torch.Tensor]:
    """What both towers make of a text."""
    ids = torch.tensor(prompts_of([9]))
    cache = model.prefill(ids)
    found = [model.next_logits(cache)]
    if model.has_denoiser:
        found.append(model.denoise(ids[:, :4], cache.view(model.config.reads), torch.ones(1)))
    return found


@pytest.mark.parametrize("sizes", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_numbers_are_those_of_weights_in_memory(
    quantization: str, dtype: torch.dtype, sizes: dict[str, object], tmp_path: Path
) -> None:
    """Guards the order of rounding: a matrix rounded to another dtype first, or another's rows,
    would change texts by so little that nobody looks."""
    save_two_towers(fresh_model(**sizes), tmp_path / "m", dtype=dtype)
    whole = accelerate(load_checkpoint(tmp_path / "m"), "native", quantization)  # type: ignore[arg-type]
    model = load_model(tmp_path / "m", quantization=quantization)  # type: ignore[arg-type]
    assert model.unread and all(p.is_meta for n, p in model.named_parameters() if n in model.unread)
    tables = (tower.embeddings.weight for tower in (model.context_tower, model.denoiser()))
    assert [table.dtype for table in tables] == [dtype, dtype]  # a table is half of a small model
    assert model.dtype == model.empty_cache(1).layers[0].ssm.dtype == torch.float32
    for own, known in zip(logits(model), logits(whole), strict=True):
        assert torch.equal(own, known)


@pytest.mark.parametrize("sizes", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", SCHEMES)
def test_numbers_of_a_quantised_checkpoint_are_in_memory_once(
    name: str, sizes: dict[str, object], tmp_path: Path
) -> None:
    """Guards checkpoints that have few bits already: both copies would be in memory, and a part
    that is left out would be another matrix's."""
    save_two_towers(fresh_model(**sizes), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "q", "released", scheme=SCHEMES[name])
    bits = SCHEMES[name].weights
    whole = accelerate(load_checkpoint(tmp_path / "q"), "native", bits)
    model = load_model(tmp_path / "q", quantization=bits)
    assert all(m.qdata.is_meta for m in model.modules() if isinstance(m, QuantisedMatrix))
    for own, known in zip(logits(model), logits(whole), strict=True):
        assert torch.equal(own, known)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_thin_denoiser_knows_its_backbone(is_tied: bool, tmp_path: Path) -> None:
    """Guards drafts: the head's rows and the fingerprint are read from the files, too. A wrong head
    drafts tokens that are never right, at the same texts."""
    backbone = random_model(config_from_dict(tiny_adapt.LLAMA | {"tie_word_embeddings": is_tied}))
    thin = tiny_adapt.thin(backbone)
    save_backbone(backbone, tmp_path / "m")
    save_denoiser(thin, tmp_path / "d", "me/model", dtype=torch.float32)
    model = load_model(tmp_path / "m", denoiser=tmp_path / "d", quantization="int8")
    assert ("context_lm_head.weight" in model.unread) is not is_tied
    for own, known in zip(logits(model), logits(accelerate(thin, "native", "int8")), strict=True):
        assert torch.equal(own, known)
    other = random_model(config_from_dict(tiny_adapt.LLAMA | {"tie_word_embeddings": is_tied}), 9)
    save_backbone(other, tmp_path / "other")
    with pytest.raises(ValueError, match="was trained for another model"):
        load_model(tmp_path / "other", denoiser=tmp_path / "d", quantization="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draft_vocab", [0, 12])
@pytest.mark.parametrize("is_tied", [True, False])
def test_adapt_begins_with_the_backbone_s_own_weights(
    is_tied: bool, draft_vocab: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Guards the first denoiser and its file: layers, head and fingerprint of what is not in
    memory. Zeros would only train longer."""
    backbone = random_model(config_from_dict(tiny_adapt.LLAMA | {"tie_word_embeddings": is_tied}))
    save_backbone(backbone, tmp_path / "m", dtype=dtype)
    options = ThinOptions(layers=2, draft_vocab=draft_vocab)
    whole = first_denoiser(load_checkpoint(tmp_path / "m", towers="context"), options, 0)
    model = load_model(tmp_path / "m", quantization="int8")
    made = first_denoiser(model, options, 0)
    for own, known in ((made.denoiser(), whole.denoiser()), (made.lm_head, whole.lm_head)):
        for name, parameter in known.named_parameters():
            assert torch.equal(own.get_parameter(name).float(), parameter), name
    assert torch.equal(sketch(made), sketch(whole))
    write_part(model, tiny_adapt.answers(24), made.config.reads, tmp_path / "part-0.safetensors")
    features, places = tiny_adapt.features_of(made), find_places(tmp_path)
    losses = [Trainer(one, features, StepOptions()).take_step(places, 0.0) for one in (made, whole)]
    assert losses[0] == losses[1]


def test_what_needs_whole_weights_says_so(tmp_path: Path) -> None:
    """Guards against saving, scoring or decoding with weights that are not there."""
    save_two_towers(fresh_model(**DENSE), tmp_path / "m")
    model = load_model(tmp_path / "m", quantization="int8")
    asked = ContextInput(torch.tensor(prompts_of([5])))
    attempts = (
        lambda: save_model(model, tmp_path / "copy"),
        lambda: accelerate(model, "eager"),
        lambda: accelerate(model, "graphs", "int8"),
        lambda: model.context_logits(torch.tensor(prompts_of([5]))),
        lambda: EagerBackend(model).context_pass(model.empty_cache(1), asked),
        lambda: EagerBackend(model).context_head(torch.zeros(1, 64)),
        lambda: EagerBackend(model).denoise(asked.tokens, model.empty_cache(1).view(), None),
        lambda: load_checkpoint(tmp_path / "m", packing=INT8).context_logits(asked.tokens),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"weights.*quantization="):
            attempt()
    assert not (tmp_path / "copy").exists()
    again = accelerate(model, "native", "int4")  # from the files, once more
    assert again.backend.quantization == "int4"
    (text,) = generate(again, prompts_of([5]), GenerateOptions(mode="ar", max_new_tokens=5))
    assert len(text.tokens) == 5


def test_a_matrix_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """Guards the check of what is read later: NaN would become numbers."""
    broken = fresh_model(**DENSE)
    with torch.no_grad():
        broken.context_tower.layers[1].mixer.q_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    save_two_towers(broken, tmp_path / "m")
    with pytest.raises(ValueError, match=r"q_proj\.weight holds NaN .* checkpoint again$"):
        load_model(tmp_path / "m", quantization="int8")


def test_files_that_change_before_they_are_packed_are_named(tmp_path: Path) -> None:
    """Guards models that are packed late or twice, as `adapt` does: of another shape, or gone."""
    save_two_towers(fresh_model(**DENSE), tmp_path / "m")
    model = load_checkpoint(tmp_path / "m", packing=INT8)
    other = fresh_model(**(DENSE | {"intermediate_size": 128}))
    save_two_towers(other, tmp_path / "m")
    with pytest.raises(ValueError, match=r"cannot be read any more \(its shape was .*anew$"):
        accelerate(model, "native", "int8")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read any more .* or load the model anew$"):
        accelerate(model, "native", "int8")


def test_the_values_of_a_model_do_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    """Guards `generate --output`, which knows a run by its weights: it failed on those in files."""
    save_two_towers(fresh_model(**DENSE), tmp_path / "m", dtype=torch.bfloat16)
    convert(tmp_path / "m", tmp_path / "q", "released", scheme=Scheme(weights="int4"))
    for folder, bits in (("m", "int8"), ("q", "int4")):
        model = load_model(tmp_path / folder, quantization=bits)  # type: ignore[arg-type]
        found = dict(model.values())
        whole = load_checkpoint(tmp_path / folder).state_dict()
        assert found.keys() == whole.keys()
        for name, known in whole.items():
            assert torch.equal(found[name].to(known.dtype), known), name


def test_one_tower_alone_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    """Guards the denoiser's rank on another host: the other tower has no memory, and no values."""
    save_two_towers(fresh_model(**DENSE), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "q", "released", scheme=Scheme(weights="int8"))
    whole = load_model(tmp_path / "q", quantization="int8")
    part = load_checkpoint(tmp_path / "q", towers="denoiser", packing=Scheme(weights="int8"))
    part = accelerate(part, "native", "int8")
    ids = torch.tensor(prompts_of([9]))
    view = whole.prefill(ids).view(whole.config.reads)
    block = torch.full((1, 4), whole.config.mask_token_id)
    asked = block, view, torch.ones(1)
    assert torch.equal(part.denoise(*asked), whole.denoise(*asked))


PROBE = """
import sys, twotower

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

twotower.load_model(sys.argv[1], quantization=sys.argv[3])  # what only the first load needs
before = peak_bytes()
model = twotower.load_model(sys.argv[2], quantization=sys.argv[3])
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("quantization", "bytes_a_weight"), [("int8", 1.0), ("int4", 0.625)])
def test_peak_memory_is_about_the_rounded_size(
    quantization: str, bytes_a_weight: float, tmp_path: Path
) -> None:
    """Guards a full copy in float32: a laptop could not run a model that it has memory for."""
    values = tiny_adapt.LLAMA | {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 64}
    save_backbone(random_model(config_from_dict(tiny_adapt.LLAMA)), tmp_path / "small")
    big = random_model(config_from_dict(values | {"num_hidden_layers": 8}), dtype=torch.bfloat16)
    num_weights = sum(p.numel() for p in big.parameters())
    save_backbone(big, tmp_path / "big")
    command = [sys.executable, "-c", PROBE, *map(str, (tmp_path / "small", tmp_path / "big"))]
    found = subprocess.run(
        [*command, quantization], check=True, capture_output=True, text=True
    ).stdout
    assert num_weights > 50_000_000
    # The largest matrix is read in the file's own dtype, and rounded in pieces.
    assert int(found) < num_weights * bytes_a_weight + 30_000_000


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_load_tells_how_far_it_is(quantization: str, tmp_path: Path) -> None:
    """Guards the bar: one that ends before matrices are packed, or never, tells nothing."""
    save_two_towers(fresh_model(**DENSE), tmp_path / "m")
    shares = list[float]()
    placement = Placement(model=str(tmp_path / "m"), quantization=quantization)  # type: ignore[arg-type]
    load(placement, show=shares.append)
    assert shares == sorted(shares) and shares[0] < 0.5 and shares[-1] == 1.0
    assert len(shares) > 20 and shares[-2] < 1.0


def test_what_does_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the machine: Linux promises memory that it has not, and ends a process when it is
    used. What fits only in few bits is loaded in few bits."""
    save_two_towers(fresh_model(**DENSE), tmp_path / "m")
    num_weights = sum(p.numel() for p in fresh_model(**DENSE).parameters())
    free = [3 * num_weights]
    monkeypatch.setattr(memory, "available_bytes", lambda *_: free[0])
    monkeypatch.setattr(memory, "_told", lambda _: 0)
    with pytest.raises(ValueError, match=r"about 0\.\d GB .* use quantization=int8 or int4, a "):
        load_model(tmp_path / "m")
    load_model(tmp_path / "m", quantization="int8")
    with pytest.raises(ValueError, match="GB"):
        load_model(tmp_path / "m", dtype="float32")
    free[0] = num_weights // 2
    with pytest.raises(ValueError, match=r"are free; use a smaller dtype"):
        load_model(tmp_path / "m", quantization="int8")
    free[0] = 2 * num_weights
    assert load_quantised(tmp_path / "m", Scheme(weights="int8")).has_denoiser
    monkeypatch.setattr(memory, "_told", lambda _: 2 * num_weights)  # swap
    load_model(tmp_path / "m", quantization="int8")


def test_a_checkpoint_of_half_precision_is_kept_so_where_float32_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards a 118 GB checkpoint that asks for 235."""
    save_two_towers(fresh_model(**EXPERTS), tmp_path / "m", dtype=torch.bfloat16)
    num_weights = sum(p.numel() for p in fresh_model(**EXPERTS).parameters())
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 3 * num_weights)
    monkeypatch.setattr(memory, "_told", lambda _: 0)
    load(Placement(model=str(tmp_path / "m")), only_decodes=True)
    assert "GB of memory" not in caplog.text
    model = load_model(tmp_path / "m")
    assert model.context_tower.embeddings.weight.dtype == torch.bfloat16
    assert model.backend.name == "native" and "use quantization=int8 or int4" in caplog.text
    with pytest.raises(ValueError, match="GB of memory"):
        load_model(tmp_path / "m", dtype="float32")
    monkeypatch.undo()
    assert load_model(tmp_path / "m").backend.name == "native"
    mapped = load_model(tmp_path / "m", expert_storage="mmap")
    assert mapped.context_tower.embeddings.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matrices_are_read_at_the_same_time(threads: int) -> None:
    """Guards loads by several threads: a matrix at another's place, and one that cannot be read,
    whose numbers would be whatever the memory held."""
    weights = {f"w{i}": torch.randn(40, 32 * (1 + i % 3)) for i in range(12)}
    weights["stack"] = torch.randn(5, 24, 64)
    before = torch.get_num_threads()

    class Unread:
        stored_bits = None

        def __init__(self, name: str) -> None:
            self._weight = weights[name]
            self._stack = self._weight if self._weight.dim() == 3 else self._weight.unsqueeze(0)

        def __len__(self) -> int:
            return len(self._stack)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self._stack[index]

        def value(self, part: str) -> torch.Tensor:
            return self._weight

    class Gone(Unread):
        def __getitem__(self, index: int) -> torch.Tensor:
            raise ValueError("gone")

    unread = {name: Unread(name) for name in weights}
    meta = {name: weight.to("meta") for name, weight in weights.items()}
    alone = {name: Packed({name: weight}, {name: 4}) for name, weight in weights.items()}
    torch.set_num_threads(threads)
    try:
        every = Packed(meta, dict.fromkeys(meta, 4), unread)
        with pytest.raises(ValueError, match="gone"):
            Packed(meta, None, unread | {"w3": Gone("w3")})
    finally:
        torch.set_num_threads(before)
    for name, own in alone.items():
        found = ctypes.string_at(every.addresses[name], own.num_bytes)
        assert found == ctypes.string_at(own.addresses[name], own.num_bytes), name
