"""What each backend runs: every combination is run here, or refused with the rule's sentence."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts import script
from tiny_models import masked_like, random_ids, random_model, tiny_model
from tiny_quantised import SCHEMES, groupable_model
from twotower import TwoTower, accelerate, load_model
from twotower.backends import BACKENDS, Setup, refusal, setup_of
from twotower.checkpoint import convert, load_checkpoint, save_two_towers
from twotower.families import config_from_dict
from twotower.layers.attention import KV
from twotower.native import library
from twotower.specs import AttentionSpec, MambaSpec

backend_table = script("backend_table")
ON_CPU = [case for case in backend_table.cases() if case.device == "cpu"]
ON_GPU = [case for case in backend_table.cases() if case.device == "cuda"]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "vocab_size": 41, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
NAMES = [name for name in BACKENDS if name != "auto"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folders of a model of each kind of layers, by the weights of the table."""
    pytest.importorskip("torchao")
    found = {}
    models = {
        "dense": groupable_model(hybrid_override_pattern="M*-M*-"),
        "Llama": random_model(config_from_dict(LLAMA)),
        "experts": groupable_model(hybrid_override_pattern="M*E-M*"),
    }
    for kind, model in models.items():
        parent = tmp_path_factory.mktemp(kind)
        for name, (dtype, scheme) in backend_table.WEIGHTS.items():
            found[name, kind] = parent / name
            if scheme is None:
                save_two_towers(model, parent / name, dtype=dtype)
            else:
                convert(parent / "float32", parent / name, "released", scheme=SCHEMES[name])
    return found


def passes(model: TwoTower) -> list[Tensor]:
    """Logits of both towers."""
    cache = model.prefill(random_ids(2, 21), torch.tensor([21, 9]))
    block = masked_like(random_ids(2, 20, seed=1))
    return [model.next_logits(cache), model.denoise(block, cache.view(), torch.tensor([0.5, 1.0]))]


@pytest.mark.parametrize("case", ON_CPU, ids=" ".join)
def test_every_combination_runs_or_is_refused(
    checkpoints: dict[tuple[str, str], Path], case: "backend_table.Case"
) -> None:
    """Guards the table: a combination that nobody tried, and one that runs something else under its
    name. What runs gives the eager backend's logits, but for the rounding to 8 or 4 bits."""
    folder = checkpoints[case.weights, case.layers.partition(",")[0]]
    storage = "mmap" if "mmap" in case.layers else "memory"
    model = load_checkpoint(folder, dtype=next(iter(case.setup.dtypes)), expert_storage=storage)
    assert setup_of(model, case.quantization).scheme == case.setup.scheme
    expected = passes(model)
    rounds = case.quantization != "none" or case.weights == "int8-int8"
    for name in NAMES:
        reason = refusal(name, case.setup)
        if reason is not None:
            with pytest.raises(ValueError, match=r"^(backend|quantization)=") as error:
                accelerate(model, name, case.quantization)
            assert f": {reason}; use " in str(error.value)
            continue
        ours = accelerate(model, name, case.quantization)
        assert ours.backend.name == name and ours.backend.quantization == case.quantization
        for found, other in zip(passes(ours), expected, strict=True):
            away = (found - other).abs().mean() / other.abs().mean()
            is_half = case.weights in ("bfloat16", "float16")
            rounds_to_4 = case.quantization == "int4" and (is_half or case.weights == "float32")
            most = 0.4 if rounds_to_4 else 0.08 if rounds else 0.02 if is_half else 1e-4
            assert away < most, name
            if is_half:  # sums in another order, or in float32, are rounded otherwise
                continue
            # Native passes round tokens, too; graphs leave a checkpoint's int8 as it is.
            rounds_here = rounds and case.weights != "int8-int8"
            assert (away > 1e-5) == (rounds_here and (name == "native" or case.weights != "int8"))


@pytest.mark.parametrize("case", ON_GPU, ids=" ".join)
def test_what_a_gpu_does_not_run(case: "backend_table.Case") -> None:
    """Guards against passes on the CPU, over weights that lie elsewhere."""
    assert refusal("native", case.setup) is not None
    bound = case.weights == "int8-int8" or "mmap" in case.layers
    rounds = case.quantization != "none"
    assert (refusal("eager", case.setup) is not None) == (bound or rounds)
    wide = ("float32", "float16")
    has_other_experts = "experts" in case.layers and case.weights in (*wide, "int4")
    cannot = case.quantization == "int4" or (rounds and case.weights == "int4")
    expected = bound or cannot or (has_other_experts and not (rounds and case.weights in wide))
    assert (refusal("graphs", case.setup) is not None) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["M*-M*-", "M*E-M*"])
def test_a_gpu_runs_eagerly(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    model = groupable_model(hybrid_override_pattern=pattern).to("cuda")
    assert accelerate(model) is model
    with pytest.raises(ValueError, match="native passes run on the CPU, not on cuda"):
        accelerate(model, "native")
    assert all(logits.isfinite().all() for logits in passes(model))


DENSE_SETUP = Setup(layers=frozenset(backend_table.DENSE))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bidirectional_mamba": True}, "native passes have no bidirectional Mamba"),
        ({"dtypes": frozenset({torch.float32, torch.float64})}, "no weights in float64"),
        ({"devices": frozenset({"cpu", "mps"})}, "not on cpu, mps"),
    ],
)
def test_what_native_passes_do_not_have(changes: dict[str, object], reason: str) -> None:
    assert refusal("native", DENSE_SETUP) is None
    found = refusal("native", dataclasses.replace(DENSE_SETUP, **changes))  # type: ignore[arg-type]
    assert found is not None and reason in found


@pytest.mark.parametrize(
    "other",
    [
        AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4),
        MambaSpec(num_heads=2, head_dim=4, state_size=16, num_groups=1, conv_width=4),
    ],
)
def test_states_of_different_sizes_stay_eager(other: AttentionSpec | MambaSpec) -> None:
    """Guards memory: room for all layers is made by the sizes of one."""
    setup = Setup(layers=frozenset((*backend_table.DENSE, other)))
    assert refusal("native", setup) == "native passes need states of one size in all layers"
    assert refusal("eager", setup) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"devices": frozenset({"cuda", "mps"})}, "graphs passes run on CUDA devices, not on mps"),
        ({"devices": frozenset({"cuda", "cpu"})}, "both towers on one device, not on cpu, cuda"),
    ],
)
def test_what_graphs_passes_do_not_have(changes: dict[str, object], reason: str) -> None:
    found = refusal("graphs", dataclasses.replace(DENSE_SETUP, **changes))  # type: ignore[arg-type]
    assert found is not None and reason in found


def test_auto_says_what_it_chose_and_why(caplog: pytest.LogCaptureFixture) -> None:
    """Guards who reads a figure: one line says what ran."""
    dense, wide = tiny_model(hybrid_override_pattern="M*-"), tiny_model(dtype=torch.float64)
    why = "native passes read no weights in float64"
    for model, line in (
        (dense, "backend=native quantization=none"),
        (tiny_model(dtype=torch.bfloat16), "backend=native quantization=none"),
        (wide, f"backend=eager quantization=none ({why})"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            accelerate(model)
        assert caplog.messages == [line]
    assert accelerate(wide) is wide and accelerate(dense, "eager") is dense


@pytest.mark.parametrize("weights", ["int8", "int8-int8", "int4", "float32"])
@pytest.mark.parametrize("layers", ["Llama", "experts"])
def test_a_slow_checkpoint_says_what_is_faster(
    checkpoints: dict[tuple[str, str], Path],
    weights: str,
    layers: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Guards who converts a model to make it fast, and waits thirty times as long for a token."""
    model = load_checkpoint(checkpoints[weights, layers], dtype=torch.float32)
    caplog.clear()
    accelerate(model)
    asked = weights if weights in ("int8", "int4") else None
    found = [line for line in caplog.messages if "many times as fast" in line]
    assert [f"quantization={asked} " in line for line in found] == [True] * (asked is not None)
    caplog.clear()
    accelerate(model, "eager")  # who names it knows
    assert not caplog.messages


@pytest.mark.parametrize(
    ("backend", "quantization", "line"),
    [
        ("eager", "int8", "quantization=int8: eager passes run weights.*; use backend=native or"),
        (
            "graphs",
            "int4",
            "quantization=int4: graphs passes round weights to int8, not.*; u",
        ),
        ("fast", "none", "backend='fast' is unknown; use one of auto, eager, native, graphs"),
        ("auto", "int3", "quantization='int3' is unknown; use one of none, int8, int4"),
    ],
)
def test_refusals_are_one_line(backend: str, quantization: str, line: str) -> None:
    """Guards int8 above all: float32 must not run under its name."""
    with pytest.raises(ValueError, match=line):
        accelerate(tiny_model(), backend, quantization)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "pattern", "dtype", "line"),
    [
        ("eager", "M*-", "float16", "float16: eager passes keep keys and values in what they comp"),
        ("graphs", "M*-", "float32", "float32: graphs passes keep keys and values in what they c"),
        ("auto", "M-", "bfloat16", "bfloat16: without attention a model has no keys and values"),
    ],
)
def test_keys_that_a_backend_does_not_keep_are_refused(
    backend: str, pattern: str, dtype: str, line: str
) -> None:
    """Guards an option without effect: whoever plans with half the memory would have twice that."""
    model = tiny_model(hybrid_override_pattern=pattern)
    with pytest.raises(ValueError, match=f"^kv_cache_dtype={line}.*; use kv_cache_dtype=auto$"):
        accelerate(model, backend, kv_cache_dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^quantization=int8: eager passes run weights as they"):
        accelerate(model, "eager", "int8", dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_cache_dtype='int8' is unknown; use one of auto, fl"):
        accelerate(model, kv_cache_dtype="int8")  # type: ignore[arg-type]


def test_keys_are_kept_as_they_were_asked_for() -> None:
    """Guards the way from the option to the cache: float32 under the name of a half."""
    asked: dict[Any, torch.dtype] = {
        "auto": torch.float32,
        torch.float32: torch.float32,
        "bfloat16": torch.bfloat16,
        torch.float16: torch.float16,
    }
    for given, expected in asked.items():
        model = load_model(kv_cache_dtype=given, backend="native")
        kept = {s.k.dtype for s in model.empty_cache(1).layers if isinstance(s, KV)}
        assert kept == {model.kv_dtype} == {expected}, given


@pytest.mark.parametrize(
    ("quantization", "remedy"),
    [
        ("none", "use quantization=int4 or backend=eager"),
        ("int8", "use backend=native with quantization=int4, or quantization=none"),
    ],
)
def test_a_quantised_checkpoint_is_sent_to_its_own_bits(
    checkpoints: dict[tuple[str, str], Path], quantization: str, remedy: str
) -> None:
    """Guards "use a checkpoint that `twotower convert` has quantised", of one that it has."""
    model = load_checkpoint(checkpoints["int4", "Llama"], dtype=torch.float32)
    with pytest.raises(ValueError, match=f"; {remedy}$"):
        accelerate(model, "native", quantization)  # type: ignore[arg-type]


def test_a_backend_leaves_the_model_alone() -> None:
    """Guards a model that is compared with itself: both would run native passes."""
    model = tiny_model(hybrid_override_pattern="M*-")
    ours = accelerate(model, "native")
    assert (model.backend.name, ours.backend.name) == ("eager", "native")
    assert (model.pass_costs, ours.pass_costs) == (
        model.backend.pass_costs,
        ours.backend.pass_costs,
    )
    assert model.pass_costs != ours.pass_costs
    assert (model.prefix_chunk, ours.prefix_chunk) == (64, 16)
    assert accelerate(ours, "eager").backend.name == "eager"


def test_the_page_has_todays_table() -> None:
    """Guards the docs; `python scripts/backend_table.py` writes it."""
    assert backend_table.TABLE.filled() == backend_table.TABLE.page


def test_costs_of_passes_are_by_the_weights_that_they_read() -> None:
    """Half of the experts are chosen by a token, so a second token misses a quarter of them."""
    experts, dense = tiny_model(), tiny_model(hybrid_override_pattern="M*-")
    assert accelerate(dense, "graphs").pass_costs.tokens[16] == 1.0
    costs = accelerate(experts, "graphs").pass_costs.tokens
    layers = experts.context_tower.layers
    weights = [*layers.parameters(), *layers.buffers(), *experts.context_lm_head.parameters()]
    total, routed = sum(w.numel() for w in weights), 4 * 2 * 16 * 12  # one layer
    assert (costs[1], costs[4]) == (1, pytest.approx((total - routed / 16) / (total - routed / 2)))
    int8 = accelerate(tiny_model(moe_intermediate_size=2048), "graphs", "int8").pass_costs.tokens
    assert int8[4] == pytest.approx(15 / 8, rel=0.1)  # 15 / 16 of all bytes by half of them


def test_a_machine_with_a_compiler_has_native_passes() -> None:
    """Guards all tests of native passes: they are skipped without the library, so with a source
    that does not compile they would all seem to pass."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    library.library()
