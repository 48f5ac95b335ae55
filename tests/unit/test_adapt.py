"""A thin denoiser: what it learns is what decoding asks of it, and nothing of a run is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny_adapt import IDS, answers, backbone, features_of, thin, unordered
from tiny_models import fresh_model, prompts_of
from twotower import GenerateOptions, TwoTower, generate
from twotower.adapt.answers import Answer
from twotower.adapt.features import find_places, write_part
from twotower.adapt.ngrams import count_ngrams
from twotower.adapt.objective import (
    NO_TARGET,
    anchor_at,
    backbone_probabilities,
    choose_drafts,
    draft_logits,
    targets_of,
    weighted_loss,
)
from twotower.adapt.training import draft_numbers
from twotower.backends import accelerate
from twotower.checkpoint import save_two_towers
from twotower.checkpoint.denoiser import load_denoiser, save_denoiser
from twotower.model.ngrams import Ngrams
from twotower.model.training import add_true_bigrams


@pytest.mark.parametrize("make", [backbone, unordered])
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("reads_hidden", [True, False])
def test_training_sees_what_decoding_asks_for(
    make: Callable[[], TwoTower], ids: Tensor | None, reads_hidden: bool, tmp_path: Path
) -> None:
    """Guards acceptance: a position, a mask, a hidden state or a bigram that is off by one in
    training costs most of it, and no loss shows that."""
    model = thin(make(), ids, reads_hidden=reads_hidden)
    (answer,) = answers(1)
    file = tmp_path / "part-00000.safetensors"
    write_part(model, [answer], model.config.reads, file)
    (place,) = find_places(tmp_path)
    rows = features_of(model).rows([place])
    text = answer.prompt + answer.tokens
    for at in range(len(answer.prompt), len(text) - 1):
        blocks = anchor_at(rows, torch.tensor([[at]]), 5)
        logits = draft_logits(model, rows, blocks)
        drafted = choose_drafts(model, logits, blocks)[0, 0]
        block = torch.full((1, 5), model.config.mask_token_id)
        block[0, 0] = text[at]
        cache = model.prefill(torch.tensor([text[:at]]))
        asked = model.denoise(block, cache.view(), torch.ones(1))[0, 1:]
        assert asked.argmax(-1).tolist() == drafted.tolist()
        true = add_true_bigrams(model, logits, blocks.clean)[0, 0, 0]  # the token before is known
        torch.testing.assert_close(true, asked[0], rtol=0.0, atol=0.25)  # features are bfloat16


@pytest.mark.parametrize("make", [backbone, unordered])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_text_is_that_of_ar(make: Callable[[], TwoTower], backend: str) -> None:
    """Guards losslessness, and that ids of a draft vocabulary are not taken for those of the
    whole."""
    model = thin(make())
    fast = accelerate(model, backend)  # type: ignore[arg-type]
    prompts = prompts_of([1, 7, 3, 12])
    plain, drafted = (
        generate(fast, prompts, GenerateOptions(mode=mode, max_new_tokens=30))  # type: ignore[arg-type]
        for mode in ("ar", "speculative")
    )
    assert [c.tokens for c in drafted] == [c.tokens for c in plain]
    assert sum(c.nfe for c in drafted) > 0
    (found,) = generate(fast, prompts[:1], GenerateOptions(mode="diffusion", max_new_tokens=12))
    assert set(found.tokens) <= set(IDS.tolist())


@pytest.mark.parametrize("backend", ["eager", "native", "graphs"])
def test_an_empty_context_has_a_hidden_state_of_zeros(backend: str) -> None:
    """Guards mode mock-ar of prompts of one token: no pass has run, and the draft failed, or took
    the output of a longer row's padding."""
    fast = accelerate(thin(backbone()), backend)  # type: ignore[arg-type]
    options, prompts = GenerateOptions(mode="mock-ar", max_new_tokens=8), prompts_of([1, 7, 1])
    together = generate(fast, prompts, options)
    alone = [generate(fast, [prompt], options)[0] for prompt in prompts]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("make", [backbone, unordered])
def test_places_of_a_block_are_told_apart(make: Callable[[], TwoTower], backend: str) -> None:
    """Guards drafts where no layer of the denoiser knows an order: with one mask for all places it
    guesses the same token everywhere, and training hides that in a higher loss. Blocks may be
    longer than those of training.
    """
    model = thin(make(), None, bigram_rank=0)
    block = torch.tensor([[7] + 6 * [67], [67, 8] + 5 * [67]])  # one more place than it has masks
    view = model.prefill(torch.tensor([[5, 9, 17], [6, 9, 11]])).view()
    expected = model.denoise(block, view, None)
    found = accelerate(model, backend).denoise(block, view, None)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)
    for place in range(1, 4):
        assert float((found[0, place] - found[0, place + 1]).abs().max()) > 0.1
    has_order = model.config.context.rotary is not None
    assert model.config.num_mask_embeddings == (1 if has_order else 5)


@pytest.mark.parametrize("ids", [None, IDS])
def test_native_bigrams_are_those_of_pytorch(ids: Tensor | None) -> None:
    """Guards acceptance: the token before, taken from another place, row or vocabulary, makes worse
    drafts, and no text shows that.
    """
    model = thin(backbone(), ids)
    block = torch.tensor([[7] + 4 * [67], [67, 8, 67, 67, 67]])
    view = model.prefill(torch.tensor([[5, 9, 17], [6, 9, 11]])).view()
    expected = model.denoise(block, view, None)
    found = accelerate(model, "native").denoise(block, view, None)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)
    model.bigram = None
    assert float((model.denoise(block, view, None) - expected)[:, 1:].abs().amax(-1).min()) > 0.1


def test_blocks_of_any_start_are_cut_where_the_text_ends(tmp_path: Path) -> None:
    """Guards targets: padding, or another answer's tokens, must never be learnt."""
    model, some = thin(backbone()), answers(3)
    write_part(model, some, model.config.reads, tmp_path / "part-00000.safetensors")
    rows = features_of(model).rows(find_places(tmp_path))
    starts = rows.lengths.unsqueeze(1) - 2
    clean = anchor_at(rows, starts, 5).clean
    assert clean[:, 0, :2].tolist() == [a.tokens[-2:] for a in some]
    assert bool((clean[:, 0, 2:] == NO_TARGET).all())
    targets = targets_of(anchor_at(rows, starts, 5), draft_numbers(model))
    known = {int(i): n for n, i in enumerate(IDS)}
    assert targets[:, 0, 0].tolist() == [known.get(a.tokens[-1], NO_TARGET) for a in some]


def test_nearer_tokens_weigh_more_and_missing_ones_nothing() -> None:
    """Guards the loss: a token without a number in the draft vocabulary has no wrong class."""
    logits = torch.zeros(1, 1, 3, 7)
    loss, weight = weighted_loss(logits, torch.tensor([[[1, NO_TARGET, 2]]]), decay=2.0)
    expected = 1.0 + torch.exp(torch.tensor(-1.0))
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(loss, expected * torch.log(torch.tensor(7.0)))


def test_soft_and_hard_targets_share_the_loss() -> None:
    """Guards the mixture: with the shares the other way round, or a token of no class counted, the
    loss would still fall."""
    logits, soft = torch.randn(1, 1, 3, 7), torch.rand(1, 1, 3, 7).softmax(-1)
    targets = torch.tensor([[[1, NO_TARGET, 2]]])
    (hard, _), (all_soft, _), (mixed, _) = (
        weighted_loss(logits, targets, 2.0, soft, share) for share in (0.0, 1.0, 0.3)
    )
    torch.testing.assert_close(mixed, 0.7 * hard + 0.3 * all_soft)


@pytest.mark.parametrize("ids", [None, IDS])
def test_soft_targets_are_what_the_backbone_chooses_from(
    ids: Tensor | None, tmp_path: Path
) -> None:
    """Guards against probabilities of the token before or behind, or of another vocabulary: the
    loss would still fall."""
    model = thin(backbone(), ids)
    prompt = prompts_of([6])[0]
    (found,) = generate(model, [prompt], GenerateOptions(mode="ar", max_new_tokens=12))
    answer = Answer(number=0, task="t", prompt=prompt, tokens=found.tokens)
    write_part(model, [answer], model.config.reads, tmp_path / "part-00000.safetensors")
    rows = features_of(model).rows(find_places(tmp_path))
    blocks = anchor_at(rows, torch.tensor([[6, 9]]), 5)
    chosen = backbone_probabilities(model, rows, blocks)
    targets = targets_of(blocks, draft_numbers(model))
    is_token = targets != NO_TARGET
    assert int(is_token.sum()) >= (8 if ids is None else 1)
    assert torch.equal(chosen.argmax(-1)[is_token], targets[is_token])
    logits = chosen.log().requires_grad_()
    loss, _ = weighted_loss(logits, targets, 3.0, chosen, share=1.0)
    loss.backward()
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denoiser_comes_back_beside_its_backbone(dtype: torch.dtype, tmp_path: Path) -> None:
    """Guards the file: a tensor that is not written would come back random."""
    model = thin(backbone())
    model.ngrams, model.tokens_per_cycle = count_ngrams(answers(30), []), 1.75
    save_denoiser(model, tmp_path / "d", "me/model", dtype=dtype)
    again = load_denoiser(backbone(), tmp_path / "d")
    assert accelerate(again, "native").tokens_per_cycle == 1.75  # by which drafts are tried
    assert again.ngrams is not None
    for part, own in zip(model.ngrams, again.ngrams, strict=True):
        np.testing.assert_allclose(part, own, atol=0.001)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match="thin denoiser is not saved with its model"):
        save_two_towers(model, tmp_path / "whole")
    with pytest.raises(ValueError, match="for another model, me/model; give that as the model"):
        load_denoiser(backbone(seed=1), tmp_path / "d")
    with pytest.raises(ValueError, match="for another model"):
        load_denoiser(fresh_model(), tmp_path / "d")


def test_damaged_denoisers_are_refused(tmp_path: Path) -> None:
    """Guards against half a file, other sizes and NaN: each would draft nonsense."""
    folder, model = tmp_path / "d", thin(backbone())
    with pytest.raises(ValueError, match="not a folder of a denoiser; give"):
        tmp_path.joinpath("none").mkdir()
        load_denoiser(backbone(), tmp_path / "none")
    save_denoiser(model, folder, "me/model")
    config = json.loads((folder / "config.json").read_text())
    whole = (folder / "model.safetensors").read_bytes()
    for changes, said in (
        ({"reads": [2, 3]}, "do not fit"),
        ({"reads": [0, 3, 99]}, "restore the file"),
        ({"bigram_rank": 3}, "do not fit"),
        ({"block_size": 0}, "block_size"),
        ({"vocab_size": True}, "vocab_size=True is of the wrong type"),
        ({"bigram_rank": 2.0}, "bigram_rank=2.0 is of the wrong type"),
        ({"reads_hidden": 1}, "reads_hidden=1 is of the wrong type"),
        ({"tokens_per_cycle": 0.5}, "tokens_per_cycle=0.5 must be a number of at least 1; restore"),
        ({"tokens_per_cycle": "2"}, "tokens_per_cycle='2' must be a number"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=said):
            load_denoiser(backbone(), folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_denoiser(backbone(), folder)
    counted = count_ngrams(answers(30), [])
    for ngrams in (
        counted._replace(keys=counted.keys[::-1].copy()),
        counted._replace(tokens=counted.tokens + 60),
        counted._replace(tokens=counted.tokens[1:]),
        counted._replace(probabilities=counted.probabilities + np.float32("nan")),
        Ngrams(*(part[:0] for part in counted)),
    ):
        model.ngrams = ngrams
        save_denoiser(model, folder, "me/model")
        with pytest.raises(ValueError, match="n-grams are damaged"):
            load_denoiser(backbone(), folder)
    model.ngrams = None
    with torch.no_grad():
        model.denoiser().norm_f.weight[0] = float("nan")
    save_denoiser(model, folder, "me/model")
    with pytest.raises(ValueError, match="NaN"):
        load_denoiser(backbone(), folder)
