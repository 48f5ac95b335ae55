"""A denoiser's folder for people: what it is, and what it needs and costs beside its backbone."""

import json
from pathlib import Path

import pytest

from tiny_adapt import IDS, answers, backbone, thin
from twotower import accelerate
from twotower.adapt.ngrams import count_ngrams
from twotower.checkpoint import save_backbone
from twotower.checkpoint.denoiser import load_denoiser, save_denoiser
from twotower.checkpoint.inspect import describe
from twotower.cli.main import main
from twotower.lab.plan.inputs import uniform
from twotower.lab.plan.passes import ModelShape, Pass, pass_parts


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Flags of a backbone on the disk and its denoiser."""
    save_backbone(backbone(), tmp_path / "m")
    save_denoiser(thin(backbone()), tmp_path / "d", "me/model")
    return ["--model", str(tmp_path / "m"), "--denoiser", str(tmp_path / "d")]


def test_inspect_tells_a_denoiser_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a folder that people find: what it is, whose it is, and where it goes."""
    model, folder = thin(backbone()), tmp_path / "d"
    model.ngrams = count_ngrams(answers(30), [])
    save_denoiser(model, folder, "me/model")
    assert main(["inspect", str(folder)]) == 0
    assert "me/model" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    own = [p for n, p in model.named_parameters() if n.startswith(("denoiser_tower.", "bigram."))]
    shared = model.denoiser().embeddings.weight.numel()
    total = sum(p.numel() for p in own)
    assert record["parameters"] in (total, total - shared)
    assert record["reads"] == [2, 3, 6] and record["ngrams"] == len(model.ngrams.keys)
    assert main(["generate", "-m", str(folder), "a"]) == 2
    assert (
        "is of a denoiser alone; give this folder as the denoiser and its"
        in capsys.readouterr().err
    )


def test_inspect_tells_both_together(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the memory that a user plans with: a denoiser shares the embeddings, and its own parts
    are as many as those of the model that is loaded.
    """
    model = thin(backbone())
    assert main(["inspect", *pair]) == 0
    printed = capsys.readouterr().out
    assert "denoiser of" in printed and "me/model" in printed and "memory" in printed
    assert main(["inspect", *pair, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["denoiser"]["reads"] == [2, 3, 6]
    named = model.named_parameters()
    context = sum(p.numel() for name, p in named if name.startswith("context_"))
    assert record["towers"]["context"]["total"] == context
    assert record["total"] == sum(
        tensor.numel() for tensor in (*model.parameters(), *model.buffers())
    )
    assert record["config"]["reads"] == [2, 3, 6] and record["config"]["block_size"] == 5


def test_plan_tells_what_drafts_cost(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the break-even: without its bigrams, or with the head of all tokens, a draft costs
    another part of a step; and a published figure of another model tells nothing of this one.
    """
    flags = [*pair, "--hardware", "epyc-9654", "--efficiency", "limit", "--json"]
    assert main(["plan", *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["modes"]["diffusion"]["missing"].startswith("tokens per pass are not known")
    assert record["workload"]["source"] == "unknown" and record["spans"]["all"] == []
    model = thin(backbone())
    shared = model.denoiser().embeddings.weight.numel()
    parts = [p for n, p in model.named_parameters() if n.startswith(("denoiser", "lm_h", "bigram"))]
    own = sum(p.numel() for p in parts) + len(IDS)
    assert record["model"]["parameters"]["denoiser"] in (own, own - shared)
    shape = ModelShape.of(describe(pair[1], denoiser=pair[3]))
    call = Pass(tower="denoiser", rows=1, tokens=5, logits=5, past=9)
    (head,) = (p for p in pass_parts(shape, call, uniform("bfloat16")) if p.name == "head")
    heads = [p for n, p in model.named_parameters() if n.startswith(("lm_head", "bigram"))]
    assert head.weight_bytes == 2 * (sum(p.numel() for p in heads) + len(IDS))
    draft_ms = record["passes"]["denoise_pass"]["ms"]
    assert main(["plan", *flags, "--tokens-per-cycle", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    cycle_ms = draft_ms + record["passes"]["verify"]["ms"]
    spent = record["modes"]["speculative"]["decode_ms_in_sequence"]
    assert spent == pytest.approx(cycle_ms * 255 / 2)
    assert main(["plan", "--denoiser", pair[-1], "--model", "shipped"]) == 2
    assert "was trained for another model, me/model" in capsys.readouterr().err


def test_a_head_of_all_tokens_is_shared(tmp_path: Path) -> None:
    """Guards the memory of both towers: a denoiser that drafts every token has the context tower's
    head, in eager and native passes, however it was made; a second copy would change no text.
    """
    model, folder = thin(backbone(), ids=None), tmp_path / "d"
    save_backbone(backbone(), tmp_path / "m")
    save_denoiser(model, folder, "me/model")
    for one in (model, load_denoiser(backbone(), folder)):
        assert one.lm_head is one.context_lm_head
        native = accelerate(one, "native", quantization="int8").backend
        assert native._denoiser._head is native._context_head  # type: ignore[attr-defined]
    assert thin(backbone()).lm_head is not model.context_lm_head  # of fewer tokens
    shape = ModelShape.of(describe(str(tmp_path / "m"), denoiser=str(folder)))
    call = Pass(tower="denoiser", rows=1, tokens=5, logits=5, past=9)
    (head,) = (p for p in pass_parts(shape, call, uniform("bfloat16")) if p.name == "head")
    read = [p for n, p in model.named_parameters() if n.startswith(("context_lm", "bigram"))]
    assert head.weight_bytes == 2 * sum(p.numel() for p in read)  # read by each draft all the same
