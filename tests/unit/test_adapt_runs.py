"""Runs of adapt: stages lead on, what a killed one left is taken up, and nothing is lost."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from tiny_adapt import answers, backbone, features_of, thin, unordered
from tiny_models import fresh_model, prompts_of
from twotower import GenerateOptions, TwoTower, generate
from twotower.adapt import files as run_files
from twotower.adapt import run as stages
from twotower.adapt.answers import (
    Answer,
    Question,
    read_answers,
    unanswered,
    write_answers,
)
from twotower.adapt.budget import Budget
from twotower.adapt.features import Features, find_places, is_whole, write_part
from twotower.adapt.ngrams import count_ngrams
from twotower.adapt.options import AnswerOptions, StepOptions, ThinOptions, WorkFolder
from twotower.adapt.run import (
    _add_to_curve,
    collect_answers,
    draft_vocabulary,
    first_denoiser,
    read_spent,
    reads_of,
    train,
)
from twotower.adapt.training import Acceptance, Trainer, measure
from twotower.checkpoint.denoiser import load_denoiser, save_denoiser
from twotower.model.precision import Scheme, quantise_modules
from twotower.model.thin import blocks_of, spread


def answered(model: TwoTower, work: WorkFolder, shape: ThinOptions, num_tokens: int) -> None:
    """The stage answers to its end, and its time not counted: on a busy machine little is left."""
    questions = [Question(number=i, prompt=p, task="t") for i, p in enumerate(prompts_of([4] * 60))]
    options = AnswerOptions(max_new_tokens=num_tokens)
    told = list(collect_answers(model, questions, work, shape, options, Budget(minutes=9)))
    assert {p.stage for p in told} <= {"answers"}
    work.spent.unlink()


def test_answers_go_on_where_a_killed_run_stopped(tmp_path: Path) -> None:
    """Guards hours of work: no answer is written twice, none is lost, half a line is none."""
    model, file = backbone(), tmp_path / "answers.jsonl"
    questions = [Question(number=i, prompt=p, task="t") for i, p in enumerate(prompts_of([4] * 9))]
    options = AnswerOptions(max_new_tokens=6, batch_size=2)
    run = write_answers(model, questions, file, options, 60.0)
    kept = [next(run).answer for _ in range(3)]
    run.close()
    with file.open("ab") as lines:
        lines.write(b'{"number": 4, "prom')
    assert read_answers(file) == kept
    left = unanswered(questions, kept)
    rest = [answer for answer, _ in write_answers(model, left, file, options, 60.0)]
    assert sorted(a.number for a in kept + rest) == list(range(9))
    assert read_answers(file) == kept + rest
    alone = generate(
        model, [q.prompt for q in questions], GenerateOptions(mode="ar", max_new_tokens=6)
    )
    assert {a.number: a.tokens for a in kept + rest} == {i: c.tokens for i, c in enumerate(alone)}


@pytest.mark.parametrize(("seconds", "is_kept"), [(30.0, True), (10.0, False)])
def test_long_answers_that_the_time_ends_are_kept(
    seconds: float, is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards small budgets: a batch that is not finished in time was thrown away, all of it. And
    prompts that were only begun are still to be answered by a run with more time."""
    model, file, ticks = backbone(), tmp_path / "answers.jsonl", count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))  # a second for each event
    question = Question(number=0, prompt=prompts_of([4])[0], task="t")
    options = AnswerOptions(max_new_tokens=40)
    found = [answer for answer, _ in write_answers(model, [question], file, options, seconds)]
    assert read_answers(file) == found
    plain = GenerateOptions(mode="ar", max_new_tokens=40)
    (whole,) = generate(model, [question.prompt], plain)
    expected = [whole.tokens[: len(answer.tokens)] for answer in found]
    assert [answer.tokens for answer in found] == expected
    assert [20 <= len(answer.tokens) < 40 for answer in found] == [True] * is_kept


def test_other_prompts_in_the_same_folder_are_answered(tmp_path: Path) -> None:
    """Guards a second file of prompts: by their numbers, its first prompts seemed answered."""
    known = Answer(number=0, task="a", prompt=[1, 2], tokens=[3])
    again, other = (Question(number=0, prompt=ids, task="b") for ids in ([1, 2], [1, 5]))
    assert unanswered([again, other], [known]) == [other]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half a part of features that a later run would take for a whole one."""
    model, file = backbone(), tmp_path / "part-00000.safetensors"
    write_part(model, answers(2), [2], file)
    before = file.read_bytes()

    def full(tensors: object, file: Path, told: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_files, "save_file", full)
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
    # It was resumed, to its end, instead of the denoiser that more time was given to.
    on = Trainer(thin(backbone()), Features([2, 6]), options, "me/denoiser")
    with pytest.raises(ValueError, match=r"a new denoiser, not with me/denoiser; .*remove"):
        on.load(tmp_path / "state.safetensors")


def test_stages_lead_to_a_folder_that_decodes(tmp_path: Path) -> None:
    """Guards the whole: stages in order, a curve, a folder that decodes."""
    model, work = backbone(), WorkFolder(tmp_path / "work")
    shape = ThinOptions(layers=2, block_size=4, draft_vocab=40, bigram_rank=2)
    answered(model, work, shape, 24)
    steps = StepOptions(answers_per_step=4, blocks_per_answer=8, warmup_steps=5)
    told = list(train(model, work, shape, steps, Budget(minutes=0.1), tmp_path / "out", "me/model"))
    assert {p.stage for p in told} == {"train"}
    curve = [json.loads(line) for line in work.curve.read_text().splitlines()]
    assert curve[-1]["blocks"] > 0 and curve[-1]["tokens_per_cycle"] >= 1.0
    drafting = load_denoiser(model, tmp_path / "out")
    first, second = ([prompt] for prompt in prompts_of([4] * 2))
    (one,) = generate(drafting, first, GenerateOptions(max_new_tokens=20, drafts="denoiser"))
    (plain,) = generate(model, first, GenerateOptions(mode="ar", max_new_tokens=20))
    assert one.tokens == plain.tokens
    assert drafting.ngrams is not None
    (most,) = generate(drafting, second, GenerateOptions(max_new_tokens=20))
    assert most.lookup_tokens > 5  # it was trained on
    # A lost file ends the next training before it begins, not where its n-grams are counted.
    work.answers.write_bytes(work.answers.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"answers.*: holds \d answers, and .*; restore the file"):
        next(train(model, work, shape, steps, Budget(minutes=9), tmp_path / "out", "me/model"))


def test_a_budget_that_is_too_small_says_so(tmp_path: Path) -> None:
    """Guards against a denoiser of a handful of answers."""
    work, shape = WorkFolder(tmp_path), ThinOptions(layers=2)
    questions = [Question(number=i, prompt=[1, 2], task="t") for i in range(60)]
    run = collect_answers(
        backbone(), questions, work, shape, AnswerOptions(batch_size=1), Budget(minutes=1e-4)
    )
    with pytest.raises(ValueError, match=r"minutes=0\.0001: the model has .* fewer --max-new"):
        list(run)
    with pytest.raises(ValueError, match="layers=9 must be at most 4"):
        reads_of(backbone().config, replace(shape, layers=9))


def test_a_run_of_all_stages_ends_in_its_time() -> None:
    """Guards --minutes: what loading and caching took too long came on top of it."""
    budget = Budget(minutes=1, began=time.monotonic() - 50, load_s=4)
    assert budget.left("train") == pytest.approx(60 - 50 - 4 - 3, abs=0.5)
    assert budget.left("measure") == pytest.approx(60 - 50, abs=0.5)
    assert Budget(minutes=1).left("train") == math.inf


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


def test_it_trains_beside_half_precision(tmp_path: Path) -> None:
    """Guards backbones whose weights stay in bfloat16: products of two dtypes ended the run."""
    model = backbone().to(torch.bfloat16)
    write_part(model, answers(9), [2, 3, 6], tmp_path / "part-00000.safetensors")
    places = find_places(tmp_path)
    trainer = Trainer(thin(model), Features([2, 6]), StepOptions())
    assert 0 < trainer.take_step(places, 0.0) < 20
    assert measure(trainer.model, Features([2, 6]), places).tokens_per_cycle >= 1.0


def test_a_run_without_time_to_train_says_so(tmp_path: Path) -> None:
    """Guards the folder of the denoiser: one that was never trained was written."""
    work, steps = WorkFolder(tmp_path / "w"), StepOptions()
    work.features.mkdir(parents=True)
    write_part(backbone(), answers(30), [6, 7], work.features / "part-00000.safetensors")
    lines = [json.dumps(vars(answer)) + "\n" for answer in answers(30)]
    work.answers.write_text("".join(lines))
    shape, budget = ThinOptions(layers=1, draft_vocab=0), Budget(minutes=1e-9)
    with pytest.raises(ValueError, match=r"minutes=1e-09: no time is left to train"):
        list(train(backbone(), work, shape, steps, budget, tmp_path / "out", "me/model"))
    assert not (tmp_path / "out").exists()


def test_a_short_run_trains_and_does_not_only_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards runs of minutes: twelve measurements took more of them than the steps between, and the
    time before the first checkpoint of a killed run was neither kept nor given again.
    """
    measurements = []

    def slow(*_: object) -> Acceptance:
        measurements.append(time.sleep(0.3))
        return Acceptance(tokens_per_cycle=1.0, right=[], answers=1)

    monkeypatch.setattr(stages, "measure", slow)
    work, shape = WorkFolder(tmp_path / "w"), ThinOptions(layers=1, draft_vocab=0)
    work.features.mkdir(parents=True)
    write_part(backbone(), answers(30), [6, 7], work.features / "part-00000.safetensors")
    work.answers.write_text("".join(json.dumps(vars(answer)) + "\n" for answer in answers(30)))
    work.spent.write_text('{"answers": 1.2, "train": 99}')
    list(train(backbone(), work, shape, StepOptions(), Budget(minutes=0.05), tmp_path / "d", "m"))
    assert len(measurements) <= 3


def test_layers_are_spread_over_blocks() -> None:
    """Guards what is read: the last block among them, MLPs with their attention."""
    blocks = blocks_of(backbone().config.context)
    assert blocks == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert blocks_of(fresh_model().config.context)[:2] == [(0,), (1, 2, 3)]
    assert spread([(i,) for i in range(30)], 3) == [9, 19, 29]
    assert spread(blocks, 4) == list(range(8))
    assert spread(blocks, 2) == [2, 3, 6, 7]


def test_a_quantised_backbone_is_refused() -> None:
    """Guards the first stage: the lack of weights showed as a defect of the program."""
    model = backbone()
    quantise_modules(model, Scheme(weights="int8"))
    with pytest.raises(ValueError, match="adapt needs full-precision weights"):
        first_denoiser(model, ThinOptions(layers=1), 0)


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
    first.ngrams = count_ngrams(answers(30), [])
    save_denoiser(first, tmp_path / "first", "me/model", dtype=torch.float32)
    shape, budget = ThinOptions(denoiser=str(tmp_path / "first")), Budget(minutes=0.05)
    answered(model, work, shape, 8)
    steps = StepOptions(learning_rate=1e-9)
    list(train(model, work, shape, steps, budget, tmp_path / "out", "me/model"))
    again = load_denoiser(model, tmp_path / "out")
    assert again.config == first.config
    assert again.ngrams is not None and {*first.ngrams.keys} < {*again.ngrams.keys}
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("make", [backbone, unordered])
def test_a_denoiser_goes_on_in_blocks_of_another_size(
    make: Callable[[], TwoTower], size: int, tmp_path: Path
) -> None:
    """Guards masks that have an embedding for each position: cut or shifted ones would begin the
    training anew, and a file that does not fit its config.json is refused after it.
    """
    model = make()
    first = thin(model)
    save_denoiser(first, tmp_path / "first", "me/model", dtype=torch.float32)
    shape = ThinOptions(denoiser=str(tmp_path / "first"), block_size=size)
    made = first_denoiser(model, shape, 0)
    save_denoiser(made, tmp_path / "second", "me/model", dtype=torch.float32)
    again = load_denoiser(model, tmp_path / "second")
    assert again.config.block_size == again.generation_defaults["block_size"] == size
    assert again.config.num_mask_embeddings in (1, size)
    block = torch.full((1, size), again.config.mask_token_id)
    view = model.prefill(torch.tensor([[5, 9, 17]])).view()
    expected = first.denoise(block, view, None)
    torch.testing.assert_close(again.denoise(block, view, None), expected, rtol=0.0, atol=0.0)


def test_features_of_other_layers_are_made_anew(tmp_path: Path) -> None:
    """Guards a work folder that is used for another shape: a layer would read nothing."""
    model, work, steps = backbone(), WorkFolder(tmp_path / "work"), StepOptions()
    budget = Budget(minutes=0.05)
    answered(model, work, ThinOptions(layers=1), 6)
    with pytest.raises(ValueError, match="is of other layers; run the stage answers first"):
        list(train(model, work, ThinOptions(layers=2), steps, budget, tmp_path / "out", "m"))
    answered(model, work, ThinOptions(layers=2), 6)
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
    with pytest.raises(ValueError, match=r"answers\.jsonl:1: is not an answer that adapt wrote"):
        read_answers(work.answers)
    work.spent.write_text(text if text != "{}" else '{"answers": []}')
    (tmp_path / "part-00000.safetensors").write_bytes(text.encode())
    if text != '{"number": 1}':
        with pytest.raises(ValueError, match="is not what adapt wrote"):
            read_spent(work)
    with pytest.raises(ValueError, match="is not a part that adapt wrote"):
        find_places(tmp_path)
    (tmp_path / "draft_vocabulary-5.json").write_text(text if text != "[1]" else "[[]]")
    if text != "{}":
        with pytest.raises(ValueError, match=r"vocabulary-5.json: is not what adapt wrote; remove"):
            draft_vocabulary(work, 5, 67)
    work.checkpoint.write_text(text)
    made = thin(backbone())
    with pytest.raises(ValueError, match="is not what adapt wrote; remove it, and the training"):
        Trainer(made, features_of(made), StepOptions()).load(work.checkpoint)
    assert not is_whole(tmp_path / "part-00000.safetensors", 1, [0])


def test_a_curve_has_each_step_once(tmp_path: Path) -> None:
    """Guards the curve of a run that was killed: steps that are taken again appeared twice."""
    model, work = backbone(), WorkFolder(tmp_path)
    trainer = Trainer(thin(model), features_of(thin(model)), StepOptions())
    found = Acceptance(tokens_per_cycle=1.5, right=[0.5], answers=1)
    for step in (10, 20, 30, 20, 20):
        trainer.step = step
        _add_to_curve(work, trainer, found, StepOptions())
    assert [json.loads(line)["steps"] for line in work.curve.read_text().splitlines()] == [10, 20]


def test_training_that_diverges_ends_at_once(tmp_path: Path) -> None:
    """Guards the time that is left: a loss of nan was trained on to the end, and saved."""
    write_part(backbone(), answers(9), [2, 3, 6], tmp_path / "part-00000.safetensors")
    places, steps = find_places(tmp_path), StepOptions(learning_rate=1e30, warmup_steps=0)
    trainer = Trainer(thin(backbone()), Features([2, 6]), steps)
    with pytest.raises(ValueError, match=r"learning_rate=1e\+30 is too high: the loss is"):
        for _ in range(5):
            trainer.take_step(places, 0.0)
