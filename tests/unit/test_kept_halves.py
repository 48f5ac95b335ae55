"""Which weights stay in the half precision of their files, and that no number depends on it."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

import tiny_adapt
from tiny_models import fresh_model, masked_like, prompts_of, random_ids, random_model
from tiny_options import options_of
from twotower import TwoTower, backends, generate, load_model
from twotower.checkpoint import save_backbone, save_two_towers
from twotower.checkpoint.denoiser import save_denoiser
from twotower.cli.main import main
from twotower.cli.output_file import run_key
from twotower.engine.resolved import resolve_options
from twotower.families import config_from_dict
from twotower.loading import Placement, load
from twotower.native import library

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

SHAPES: dict[str, dict[str, object]] = {
    "dense": {"hybrid_override_pattern": "M*-M*-"},
    "experts": {"hybrid_override_pattern": "M*E-", "moe_latent_size": 12},
    "tied": {"hybrid_override_pattern": "M*-", "tie_word_embeddings": True},
}
Half = Literal["bfloat16", "float16"]


def numbers(model: TwoTower) -> list[Tensor]:
    """What both towers make of a text."""
    ids, times = torch.tensor(prompts_of([9])), torch.tensor([0.75])
    cache = model.prefill(ids)
    found = [model.next_logits(cache)]
    if model.has_denoiser:
        found.append(model.denoise(masked_like(random_ids(1, 7)), cache.view(), times))
    return found


def dtypes(model: TwoTower, *ends: str) -> set[torch.dtype]:
    return {p.dtype for name, p in model.named_parameters() if name.endswith(ends)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_keeps_matrices_and_changes_no_number(
    shape: str, dtype: Half, tmp_path: Path
) -> None:
    """Guards twice the memory and time where a file has half precision; and texts: vectors of a
    file that has those in float32 would be rounded.
    """
    wanted: torch.dtype = getattr(torch, dtype)
    model = fresh_model(**SHAPES[shape])
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith(("conv1d.weight", "gate.weight")):
            parameter.data = parameter.data.to(wanted)
    save_two_towers(model, tmp_path / "m")
    placement = Placement(model=str(tmp_path / "m"))
    ours, whole = load(placement, only_decodes=True), load(placement)
    assert ours.model.backend.name == whole.model.backend.name == "native"
    ends = "q_proj.weight", "in_proj.weight", "embeddings.weight", "lm_head.weight", "s.up_proj"
    assert dtypes(ours.model, *ends) == {wanted}
    assert dtypes(ours.model, "norm.weight", "norm_f.weight", "A_log", "D", "bias", "tables.0") == {
        torch.float32
    }
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    for one, other in zip(numbers(ours.model), numbers(whole.model), strict=True):
        assert torch.equal(one, other)
    asked = options_of({}, {"mode": "diffusion", "max_new_tokens": 20, "temperature": 1.0})
    texts = [generate(m.model, prompts_of([1, 7]), asked) for m in (ours, whole)]
    assert [row.tokens for row in texts[0]] == [row.tokens for row in texts[1]]
    options = [resolve_options(asked, one.model.generation_defaults) for one in (ours, whole)]
    assert run_key(ours, options[0]) == run_key(whole, options[1])  # a run goes on from either
    kept = load(replace(placement, kv_cache_dtype="float16"))  # which writes another text
    assert run_key(kept, options[1]) != run_key(whole, options[1])


def test_all_else_gets_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards scores, training and eager passes: in half precision they compute in that."""
    save_two_towers(fresh_model(**SHAPES["dense"]), tmp_path / "m", dtype=torch.bfloat16)
    name = str(tmp_path / "m")
    wide = {torch.float32}
    assert {p.dtype for p in load_model(name).parameters()} == wide
    eager = load(Placement(model=name, backend="eager"), only_decodes=True)
    assert {p.dtype for p in eager.model.parameters()} == wide
    named = load(Placement(model=name, dtype="float32"), only_decodes=True)
    assert {p.dtype for p in named.model.parameters()} == wide
    monkeypatch.setattr(backends, "is_available", lambda: False)  # no compiler
    assert {
        p.dtype for p in load(Placement(model=name), only_decodes=True).model.parameters()
    } == wide


@pytest.mark.parametrize("drafts", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backbone", [torch.float32, torch.bfloat16])
def test_a_thin_denoiser_keeps_its_own(
    backbone: torch.dtype, drafts: torch.dtype, tmp_path: Path
) -> None:
    """Guards a denoiser in float32 beside a backbone in half precision: rounded it drafts less."""
    model = random_model(config_from_dict(tiny_adapt.LLAMA))
    save_backbone(model, tmp_path / "m", dtype=backbone)
    kept = load_model(tmp_path / "m")  # as the file has it
    save_denoiser(tiny_adapt.thin(kept), tmp_path / "d", "me/model", dtype=drafts)
    placement = Placement(model=str(tmp_path / "m"), denoiser=str(tmp_path / "d"))
    ours, whole = (load(placement, only_decodes=only).model for only in (True, False))
    assert dtypes(ours.context_tower, "_proj.weight") == {backbone}  # type: ignore[arg-type]
    assert dtypes(ours.denoiser(), "_proj.weight") == {drafts}  # type: ignore[arg-type]
    for one, other in zip(numbers(ours), numbers(whole), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "only_decodes"),
    [
        (["generate", "a"], True),
        (["generate", "--input", "questions.jsonl", "--output", "out.jsonl"], True),
        (["chat"], True),
        (["serve"], True),
        (["demo"], True),
        (["evaluate"], False),
        (["bench"], False),
    ],
)
def test_verbs_that_only_decode_say_so(
    arguments: list[str],
    only_decodes: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards the memory of a server, and the numbers of a report."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n')
    asked = []

    def refuse(placement: Placement, mode: object, show: object, only: bool) -> None:
        asked.append(only)
        raise ValueError("enough")

    monkeypatch.setattr("twotower.cli.progress.load", refuse)
    assert main(arguments) == 2
    assert "enough" in capsys.readouterr().err and asked == [only_decodes]
