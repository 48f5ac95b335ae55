"""Variants of the denoiser recipe: shared or trained context, early blocks, new starts."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tiny_denoiser import denoiser, exported, make_backbone, run
from tiny_training import make_shard
from twotower.checkpoint import load_checkpoint
from twotower.model.two_tower import TwoTower
from twotower.tokenizer import load_tokenizer
from twotower.train.data import Rows
from twotower.train.loop import train_steps
from twotower.train.models import starting_model
from twotower.train.objective import MaskedBlocks, row_noise
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config
from twotower.train.run_folder import RunFolder, read_metrics
from twotower.train.shard import Shard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("data") / "shard")


@pytest.fixture(scope="module")
def backbone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(data, tmp_path_factory.mktemp("run"))


def start(options: TrainOptions) -> TwoTower:
    return starting_model(options, Shard(options.data))


def trained(model: TwoTower) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


CONDITIONING = {"t_embedder", "t_block", "scale_shift_tables"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, {"denoiser_tower", "lm_head"}),
        ({"towers": "tied"}, {"context_tower", "lm_head"}),
        ({"towers": "tied-ar"}, {"context_tower", "lm_head", "context_lm_head"}),
        ({"train_context": True}, {"context_tower", "denoiser_tower", "lm_head"}),
        ({"train_context": True, "ar_loss_weight": 0.5},
         {"context_tower", "denoiser_tower", "lm_head", "context_lm_head"}),
    ],
)  # fmt: skip
def test_what_each_variant_trains(
    data: Path, backbone: Path, tmp_path: Path, changes: dict[str, object], parts: set[str]
) -> None:
    """Silent failure: a tower that should be frozen moves, or one that should move does not."""
    options = denoiser(data, backbone, tmp_path / "run", **changes)
    assert trained(start(options)) == parts | CONDITIONING
    run(options)
    before, after = load_checkpoint(backbone), exported(options)
    then, now = before.state_dict(), after.state_dict()
    moved = {name.split(".")[0] for name in now if not torch.equal(now[name], then[name])}
    is_tied = options.towers != "two"
    # a tied tower is written twice, so that any reader of the layout finds both
    assert moved == parts | CONDITIONING | ({"denoiser_tower"} if is_tied else set())
    assert after.denoiser_tower is not None
    own = after.denoiser_tower.state_dict()
    shared = [torch.equal(own[n], v) for n, v in after.context_tower.state_dict().items()]
    assert all(shared) == is_tied


def test_a_tied_model_goes_on_but_two_towers_cannot_be_tied(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: a trained denoiser is thrown away for the context tower's weights."""
    tied = denoiser(data, backbone, tmp_path / "tied", towers="tied")
    run(tied)
    again = denoiser(data, tmp_path / "tied" / "export", tmp_path / "again", towers="tied", steps=1)
    assert run(again)
    run(denoiser(data, backbone, tmp_path / "two"))
    with pytest.raises(ValueError, match=r"towers: tied needs one tower.*differ") as caught:
        run(denoiser(data, tmp_path / "two" / "export", tmp_path / "no", towers="tied"))
    assert "\n" not in str(caught.value)


def test_the_next_token_loss_keeps_the_context_head_alive(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: the validation loss counts the context's loss, and variants cannot be
    compared.
    """
    losses, validations = {}, {}
    for towers in ("tied", "tied-ar"):
        options = denoiser(
            data, backbone, tmp_path / towers, towers=towers, steps=1, eval_every=1,
            learning_rate=1e-9,
        )  # fmt: skip
        (report,) = run(options)
        losses[towers], validations[towers] = report.loss, report.validation_loss
    assert losses["tied-ar"] - losses["tied"] > 1.0  # nats of a backbone of three steps
    assert validations["tied-ar"] == pytest.approx(validations["tied"], abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9, "denoiser_init": "scratch", "optimizer": "muon"},
        {"ema_decay": 0.5, "towers": "tied-ar", "early_block_size": 32, "block_size": 8},
        {"train_context": True, "ar_loss_weight": 0.5, "bidirectional_mamba": True},
    ],
    ids=["scratch", "tied", "context"],
)
def test_a_resumed_variant_equals_an_unbroken_one(
    data: Path, backbone: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Silent failure: an average, a tie, a block size or a momentum is lost at a restart."""
    common = {"steps": 5, "checkpoint_every": 2, "learning_rate": 0.01} | changes
    whole = denoiser(data, backbone, tmp_path / "whole", **common)
    broken = denoiser(data, backbone, tmp_path / "broken", **common)
    run(whole)
    steps = train_steps(broken)
    for _ in range(3):
        next(steps)
    del steps  # as a kill would: nothing is saved on the way out
    assert run(broken)[0].step == 3
    one, two = (read_metrics(RunFolder(o.run_folder).metrics) for o in (whole, broken))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    a, b = (exported(o).state_dict() for o in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert exported(broken).config == exported(whole).config


def test_a_resumed_run_does_not_need_its_initial_checkpoint(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: a run is lost with the backbone that it has taken over long ago."""
    init = tmp_path / "init"
    shutil.copytree(backbone, init)
    run(denoiser(data, init, tmp_path / "run", steps=2))
    shutil.rmtree(init)
    assert [r.step for r in run(denoiser(data, init, tmp_path / "run", steps=3))] == [3]


def test_early_blocks_come_first(
    data: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: the curriculum never changes over, or validation changes with it."""
    seen: list[tuple[int, bool]] = []
    original = TwoTower.training_logits

    def remember(self: TwoTower, clean: object, noisy: object, t: object, block_size: int,
                 index: object) -> object:  # fmt: skip
        seen.append((block_size, torch.is_grad_enabled()))
        return original(self, clean, noisy, t, block_size, index)  # type: ignore[arg-type]

    monkeypatch.setattr(TwoTower, "training_logits", remember)
    options = denoiser(
        data, backbone, tmp_path / "run", steps=5, early_block_size=32, early_fraction=0.4,
        eval_every=1, eval_rows=1,
    )  # fmt: skip
    run(options)
    assert [size for size, is_training in seen if is_training] == [32, 32, 16, 16, 16]
    assert {size for size, is_training in seen if not is_training} == {16}


def test_the_export_carries_what_it_was_trained_for(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: a model decodes with other blocks, or another scan, than it has learnt."""
    first = denoiser(data, backbone, tmp_path / "a", block_size=8, bidirectional_mamba=True)
    run(first)
    config = exported(first).config
    assert (config.block_size, config.bidirectional_mamba) == (8, True)
    on = denoiser(data, tmp_path / "a" / "export", tmp_path / "b")
    run(on)
    assert exported(on).config == config  # kept without being asked for again


def test_a_denoiser_starts_from_the_context_its_own_or_nothing(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: 'scratch' keeps norms or heads of the backbone, or 'context' overwrites a
    trained denoiser.
    """
    source = load_checkpoint(backbone)
    fresh = start(denoiser(data, backbone, tmp_path / "x", denoiser_init="scratch", seed=4))
    other = start(denoiser(data, backbone, tmp_path / "x", denoiser_init="scratch", seed=5))
    assert fresh.denoiser_tower is not None and source.denoiser_tower is not None
    for name, value in source.context_tower.state_dict().items():
        assert torch.equal(fresh.context_tower.state_dict()[name], value)
        random = fresh.denoiser_tower.state_dict()[name]
        assert not torch.equal(random, value) or name.endswith("conv1d.bias"), name
    assert not torch.equal(fresh.lm_head.weight, source.lm_head.weight)
    assert not torch.equal(fresh.lm_head.weight, other.lm_head.weight)
    assert torch.equal(fresh.context_lm_head.weight, source.context_lm_head.weight)
    assert all(table[2].eq(1).all() and table[:2].eq(0).all() for table in fresh.scale_shift_tables)
    assert all(p.eq(0).all() for p in fresh.t_block.parameters())

    first = denoiser(data, backbone, tmp_path / "first")
    run(first)
    on = start(denoiser(data, tmp_path / "first" / "export", tmp_path / "x"))
    before = exported(first).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in on.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"towers": "three"}, "towers='three' is unknown; use one of two, tied, tied-ar"),
        ({"denoiser_init": "random"}, "denoiser_init"),
        ({"towers": "tied", "train_context": True}, "train_context: no effect"),
        ({"towers": "tied", "denoiser_init": "scratch"}, "denoiser_init: scratch would lose"),
        ({"towers": "tied", "ar_loss_weight": 1.0}, "ar_loss_weight: no effect"),
        ({"ar_loss_weight": 1.0}, "ar_loss_weight: no effect"),
        ({"train_context": True, "ar_loss_weight": -1.0}, "ar_loss_weight=-1.0"),
        ({"early_fraction": 0.3}, "early_fraction: no effect without early_block_size"),
        (
            {"early_block_size": 32, "early_fraction": 1.0},
            "early_fraction=1.0 must be above",
        ),
        ({"early_block_size": 0}, "early_block_size=0"),
        ({"early_block_size": 8, "block_size": 8}, "early_block_size: 8 is block_size itself"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0 and below 1"),
        ({"ema_decay": float("nan")}, "ema_decay=nan"),
    ],
)
def test_options_without_effect_or_sense_are_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        denoiser(tmp_path, tmp_path, tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("early", "words"), [(16, "is the model's own"), (24, "not a multiple of early_block_size=24")]
)
def test_early_blocks_must_fit_model_and_row(
    data: Path, backbone: Path, tmp_path: Path, early: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run(denoiser(data, backbone, tmp_path / "run", early_block_size=early))


@pytest.mark.parametrize(
    "changes", [{"ema_decay": 0.5}, {"towers": "tied"}, {"bidirectional_mamba": True}]
)
def test_a_variant_is_not_continued_as_another(
    data: Path, backbone: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    options = denoiser(data, backbone, tmp_path / "run", steps=2)
    run(options)
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: .* differs from"):
        run(denoiser(data, backbone, tmp_path / "run", steps=3, **changes))
    file = options.run_folder / "options.json"
    values = json.loads(file.read_text())
    for name in ("ema_decay", "towers", "bidirectional_mamba", "early_fraction", "optimizer"):
        del values[name]  # as a version wrote it that had none of them
    file.write_text(json.dumps(values))
    assert [r.step for r in run(denoiser(data, backbone, tmp_path / "run", steps=3))] == [3]


def test_a_files_own_loss_mask_is_what_is_learnt(data: Path, tmp_path: Path) -> None:
    """Silent failure: from prompt/completion JSONL to the loss, the mask slips by a token."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    options = denoiser(
        data, tmp_path, tmp_path / "run", targets="completion", fully_masked_fraction=1.0
    )
    shard = Shard(data)
    batch = Rows(shard, options.sequence_length, options.seed).training(0, 8)
    model = TwoTower(preset_config("tiny", shard.meta.vocab_size))

    def remember(clean: torch.Tensor, noisy: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((clean, noisy))
        return torch.zeros(*noisy.shape, shard.meta.vocab_size)

    model.training_logits = remember  # type: ignore[method-assign, assignment]
    objective = MaskedBlocks(options, 16, 3)
    objective.loss_sums(model, objective.draw(batch, row_noise(0, 0, range(8))))
    ((clean, noisy),) = seen
    tokenizer = load_tokenizer(data)
    texts = [tokenizer.decode(row[m].tolist()) for row, m in zip(clean, noisy == 3, strict=True)]
    for text in texts:
        whole = [part for part in text.split("\n") if part.startswith("it is ")]
        assert whole and "Say" not in text and ": " not in text
    assert any(tokenizer.eos_id in row[m] for row, m in zip(clean, noisy == 3, strict=True))
