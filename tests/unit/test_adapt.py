"""A thin denoiser: what it learns is what decoding asks of it, and nothing of a run is lost."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_models import fresh_model, prompts_of, random_model
from twotower import GenerateOptions, TwoTower, generate
from twotower.adapt import features as feature_files
from twotower.adapt.answers import Answer, Question, read_answers, write_answers
from twotower.adapt.features import Features, attended, find_places, write_part
from twotower.adapt.objective import (
    NO_TARGET,
    add_true_bigrams,
    anchor_at,
    backbone_probabilities,
    choose_drafts,
    draft_logits,
    targets_of,
    weighted_loss,
)
from twotower.adapt.options import AnswerOptions, Budget, StepOptions, ThinOptions, WorkFolder
from twotower.adapt.run import (
    Progress,
    _read_spent,
    collect_answers,
    draft_vocabulary,
    reads_of,
    train,
)
from twotower.adapt.training import Trainer, draft_numbers, measure
from twotower.backends import accelerate
from twotower.checkpoint.denoiser import load_denoiser, save_denoiser, with_new_denoiser
from twotower.cli.main import main
from twotower.config import DraftSpec
from twotower.families import config_from_dict
from twotower.model.thin import blocks_of, spread, thin_config

LLAMA: dict[str, object] = {
    "model_type": "qwen3", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "eos_token_id": 66, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
IDS = torch.tensor([2, 5, 6, 9, 11, 17, 18, 30, 31, 40, 52, 66])


def backbone(seed: int = 0) -> TwoTower:
    return random_model(config_from_dict(LLAMA), seed)


def with_values(model: TwoTower) -> TwoTower:
    """A denoiser of which every part matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("context_", "lm_head")) and "embeddings" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def unordered() -> TwoTower:
    """A backbone whose attention knows no positions: its Mamba layers do."""
    return fresh_model(hybrid_override_pattern="M-*-M-*-", vocab_size=67, hidden_size=32)


def thin(model: TwoTower, ids: Tensor | None = IDS, **spec: object) -> TwoTower:
    values = {"vocab_size": None if ids is None else len(ids), "bigram_rank": 4, **spec}
    draft = DraftSpec(**values)  # type: ignore[arg-type]
    return with_values(
        with_new_denoiser(model, thin_config(model.config, (2, 3, 6), 5, draft), ids, 0)
    )


def features_of(model: TwoTower) -> Features:
    return Features(attended(model.config.context, model.config.reads))


def answers(count: int) -> list[Answer]:
    prompts = prompts_of([3 + i % 5 for i in range(count)])
    return [
        Answer(number=i, task="t", prompt=prompt, tokens=prompts_of([9 + i % 7], seed=i)[0])
        for i, prompt in enumerate(prompts)
    ]


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
        true = add_true_bigrams(model, logits, blocks)[0, 0, 0]  # the token before is known
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
    assert model.config.mask_places == (1 if has_order else 5)


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
    save_denoiser(model, tmp_path / "d", "me/model", dtype=dtype)
    again = load_denoiser(backbone(), tmp_path / "d")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match="of another model, me/model; give that as --model"):
        load_denoiser(backbone(seed=1), tmp_path / "d")
    with pytest.raises(ValueError, match="of another model"):
        load_denoiser(fresh_model(), tmp_path / "d")


def test_damaged_denoisers_are_refused(tmp_path: Path) -> None:
    """Guards against half a file, other sizes and NaN: each would draft nonsense."""
    folder, model = tmp_path / "d", thin(backbone())
    with pytest.raises(ValueError, match="no denoiser alone"):
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
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=said):
            load_denoiser(backbone(), folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_denoiser(backbone(), folder)
    with torch.no_grad():
        model.denoiser().norm_f.weight[0] = float("nan")
    save_denoiser(model, folder, "me/model")
    with pytest.raises(ValueError, match="NaN"):
        load_denoiser(backbone(), folder)


def test_answers_go_on_where_a_killed_run_stopped(tmp_path: Path) -> None:
    """Guards hours of work: no answer is written twice, none is lost, half a line is none."""
    model, file = backbone(), tmp_path / "answers.jsonl"
    questions = [Question(number=i, prompt=p, task="t") for i, p in enumerate(prompts_of([4] * 9))]
    options = AnswerOptions(max_tokens=6, rows=2)
    run = write_answers(model, questions, file, options, 60.0)
    kept = [next(run) for _ in range(3)]
    run.close()
    with file.open("ab") as lines:
        lines.write(b'{"number": 4, "prom')
    assert read_answers(file) == kept
    rest = list(write_answers(model, questions, file, options, 60.0))
    assert sorted(a.number for a in kept + rest) == list(range(9))
    assert read_answers(file) == kept + rest
    alone = generate(
        model, [q.prompt for q in questions], GenerateOptions(mode="ar", max_new_tokens=6)
    )
    assert {a.number: a.tokens for a in kept + rest} == {i: c.tokens for i, c in enumerate(alone)}


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half a part of features that a later run would take for a whole one."""
    model, file = backbone(), tmp_path / "part-00000.safetensors"
    write_part(model, answers(2), [2], file)
    before = file.read_bytes()

    def full(tensors: object, file: Path, told: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_files, "save_file", full)
    with pytest.raises(ValueError, match=r"No space left on device.*free some space"):
        write_part(model, answers(4), [2], file)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_run_that_is_killed_takes_the_same_steps(tmp_path: Path) -> None:
    """Guards resume: another order of answers, or lost moments, would train another denoiser."""
    model = backbone()
    write_part(model, answers(30), [2, 3, 6], tmp_path / "part-00000.safetensors")
    places, options = find_places(tmp_path), StepOptions(answers_per_step=2, blocks_per_answer=3)

    def trainer() -> Trainer:
        return Trainer(thin(backbone()), Features([2, 6]), options)

    whole, first, second = trainer(), trainer(), trainer()
    expected = [whole.take_step(places, 0.1 * i) for i in range(6)]
    found = [first.take_step(places, 0.1 * i) for i in range(3)]
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    found += [second.take_step(places, 0.1 * i) for i in range(3, 6)]
    assert found == expected
    other = Trainer(thin(backbone(), bigram_rank=3), Features([2, 6]), options)
    with pytest.raises(ValueError, match="another shape"):
        other.load(tmp_path / "state.safetensors")


def test_stages_lead_to_a_folder_that_decodes(tmp_path: Path) -> None:
    """Guards the whole: stages in order, a curve, a folder that decodes."""
    model, work = backbone(), WorkFolder(tmp_path / "work")
    questions = [Question(number=i, prompt=p, task="t") for i, p in enumerate(prompts_of([4] * 60))]
    shape = ThinOptions(layers=2, block_size=4, draft_vocab=40, bigram_rank=2)
    options, budget = AnswerOptions(max_tokens=24), Budget(minutes=0.2)
    told: list[Progress] = []
    told += collect_answers(model, questions, work, shape, options, budget)
    steps = StepOptions(answers_per_step=4, blocks_per_answer=8, warmup_steps=5)
    told += train(model, work, shape, steps, budget, tmp_path / "out", "me/model")
    assert {p.stage for p in told} == {"answers", "train"}
    curve = [json.loads(line) for line in work.curve.read_text().splitlines()]
    assert curve[-1]["blocks"] > 0 and curve[-1]["tokens_per_cycle"] >= 1.0
    drafting = load_denoiser(model, tmp_path / "out")
    (one,) = generate(
        drafting, [questions[0].prompt], GenerateOptions(max_new_tokens=20, drafts="denoiser")
    )
    (plain,) = generate(model, [questions[0].prompt], GenerateOptions(mode="ar", max_new_tokens=20))
    assert one.tokens == plain.tokens


def test_a_budget_that_is_too_small_says_so(tmp_path: Path) -> None:
    """Guards against a denoiser of a handful of answers."""
    work, shape = WorkFolder(tmp_path), ThinOptions(layers=2)
    questions = [Question(number=i, prompt=[1, 2], task="t") for i in range(60)]
    run = collect_answers(
        backbone(), questions, work, shape, AnswerOptions(rows=1), Budget(minutes=1e-4)
    )
    with pytest.raises(ValueError, match=r"minutes=0\.0001: the model has written .* are needed"):
        list(run)
    with pytest.raises(ValueError, match="layers=9 must be at most 4"):
        reads_of(backbone(), replace(shape, layers=9))


def test_draft_vocabulary_is_the_most_frequent_and_stays(tmp_path: Path) -> None:
    """Guards a resumed run: other numbers for the same tokens would undo all training."""
    work = WorkFolder(tmp_path)
    line = {"number": 0, "task": "t", "prompt": [60, 61], "tokens": [7, 7, 8, 9, 9, 9]}
    work.answers.write_text(json.dumps(line) + "\n")
    found = draft_vocabulary(work, 5, 67)
    assert found is not None and found.tolist() == [7, 8, 9, 60, 61]
    work.answers.write_text(json.dumps(line | {"tokens": [50] * 9}) + "\n")
    again = draft_vocabulary(work, 5, 67)
    assert again is not None and again.tolist() == found.tolist()
    assert draft_vocabulary(work, 0, 67) is None


def test_it_learns_what_can_be_learnt(tmp_path: Path) -> None:
    """Guards the gradient: a head, a mask or targets that do not reach the loss teach nothing."""
    model, circle = thin(backbone()), [5, 9, 17, 30, 52]
    some = [Answer(number=i, task="t", prompt=[1, 2 + i], tokens=circle * 4) for i in range(4)]
    write_part(model, some, model.config.reads, tmp_path / "part-00000.safetensors")
    places, features = find_places(tmp_path), features_of(model)
    trainer = Trainer(model, features, StepOptions(warmup_steps=1, learning_rate=5e-3))
    before = measure(model, features, places).tokens_per_cycle
    losses = [trainer.take_step(places, 0.0) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert measure(model, features, places).tokens_per_cycle > max(3.0, before)


def test_layers_are_spread_over_blocks() -> None:
    """Guards what is read: the last block among them, MLPs with their attention."""
    blocks = blocks_of(backbone().config.context)
    assert blocks == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert blocks_of(fresh_model().config.context)[:2] == [(0,), (1, 2, 3)]
    assert spread([(i,) for i in range(30)], 3) == [9, 19, 29]
    assert spread(blocks, 4) == list(range(8))
    assert spread(blocks, 2) == [2, 3, 6, 7]


def test_acceptance_is_counted_as_decoding_would(tmp_path: Path) -> None:
    """Guards the curve: what it says must be what speculation gives."""
    model = thin(backbone(), None)
    prompt = prompts_of([6])[0]
    (plain,) = generate(model, [prompt], GenerateOptions(mode="ar", max_new_tokens=40))
    answer = Answer(number=0, task="t", prompt=prompt, tokens=plain.tokens)
    write_part(model, [answer], model.config.reads, tmp_path / "part-00000.safetensors")
    found = measure(model, features_of(model), find_places(tmp_path))
    assert found.tokens_per_cycle >= 1.0
    assert len(found.right) == 4


def test_a_denoiser_is_trained_on(tmp_path: Path) -> None:
    """Guards a second run with more time: one that begins anew, or reads other layers than the
    denoiser was made for, would throw the first away."""
    model, work = backbone(), WorkFolder(tmp_path / "work")
    first = thin(model)
    save_denoiser(first, tmp_path / "first", "me/model", dtype=torch.float32)
    questions = [Question(number=i, prompt=p, task="t") for i, p in enumerate(prompts_of([4] * 40))]
    shape, budget, start = ThinOptions(layers=1), Budget(minutes=0.05), tmp_path / "first"
    list(collect_answers(model, questions, work, shape, AnswerOptions(max_tokens=8), budget, start))
    steps = StepOptions(learning_rate=1e-9)
    list(train(model, work, shape, steps, budget, tmp_path / "out", "me/model", start))
    again = load_denoiser(model, tmp_path / "out")
    assert again.config == first.config
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0.01, atol=0.01)


def test_inspect_tells_a_denoiser_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a folder that people find: what it is, whose it is, and where it goes."""
    model, folder = thin(backbone()), tmp_path / "d"
    save_denoiser(model, folder, "me/model")
    assert main(["inspect", str(folder)]) == 0
    assert "me/model" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    own = [p for n, p in model.named_parameters() if n.startswith(("denoiser_tower.", "bigram."))]
    shared = model.denoiser().embeddings.weight.numel()
    total = sum(p.numel() for p in own)
    assert record["parameters"] in (total, total - shared)
    assert record["reads"] == [2, 3, 6]
    assert main(["generate", "-m", str(folder), "a"]) == 2
    assert "is of a denoiser alone; give 'me/model'" in capsys.readouterr().err


def test_features_of_other_layers_are_made_anew(tmp_path: Path) -> None:
    """Guards a work folder that is used for another shape: a layer would read nothing."""
    model, work, steps = backbone(), WorkFolder(tmp_path / "work"), StepOptions()
    questions = [Question(number=i, prompt=p, task="t") for i, p in enumerate(prompts_of([4] * 30))]
    budget, options = Budget(minutes=0.05), AnswerOptions(max_tokens=6)
    list(collect_answers(model, questions, work, ThinOptions(layers=1), options, budget))
    with pytest.raises(ValueError, match="is of other layers; run the stage answers first"):
        list(train(model, work, ThinOptions(layers=2), steps, budget, tmp_path / "out", "m"))
    list(collect_answers(model, questions, work, ThinOptions(layers=2), options, budget))
    list(train(model, work, ThinOptions(layers=2), steps, budget, tmp_path / "out", "m"))
    assert load_denoiser(model, tmp_path / "out").config.reads == (2, 3, 6, 7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_of_either_optimiser_comes_back(optimizer: str, tmp_path: Path) -> None:
    """Guards resume with Muon, whose moments have other names."""
    model = backbone()
    write_part(model, answers(30), [2, 3, 6], tmp_path / "part-00000.safetensors")
    places = find_places(tmp_path)
    options = StepOptions(answers_per_step=2, blocks_per_answer=3, optimizer=optimizer)  # type: ignore[arg-type]
    one, two = (Trainer(thin(backbone()), Features([2, 6]), options) for _ in range(2))
    one.take_step(places, 0.0)
    one.save(tmp_path / "state.safetensors")
    two.load(tmp_path / "state.safetensors")
    assert [one.take_step(places, 0.1) for _ in range(2)] == [
        two.take_step(places, 0.1) for _ in range(2)
    ]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"number": 1}', "nonsense", "[" * 100_000])
def test_work_that_adapt_did_not_write_is_one_line(text: str, tmp_path: Path) -> None:
    """Guards resuming on a folder that was edited, or is somebody else's."""
    work = WorkFolder(tmp_path)
    work.answers.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl:1: is no answer that adapt wrote"):
        read_answers(work.answers)
    work.spent.write_text(text if text != "{}" else '{"train": []}')
    (tmp_path / "part-00000.safetensors").write_bytes(text.encode())
    if text != '{"number": 1}':
        with pytest.raises(ValueError, match="is not what adapt wrote"):
            _read_spent(work)
    with pytest.raises(ValueError, match="is no part that adapt wrote"):
        find_places(tmp_path)
    assert not feature_files.is_whole(tmp_path / "part-00000.safetensors", 1, [0])
