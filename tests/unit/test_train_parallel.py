"""A model on several processes, as far as one process can tell: shares, shards, Muon, checkpoints.

Runs of several processes are tests/e2e/test_train_parallel.py's business.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from tiny_models import fresh_model, random_ids
from tiny_training import make_shard, tiny_options
from twotower.model.two_tower import TwoTower
from twotower.train import loop
from twotower.train.balance import ExpertBalance
from twotower.train.data import Batch
from twotower.train.loop import check_divisible, train
from twotower.train.metrics import read_metrics
from twotower.train.options import TrainOptions
from twotower.train.parallel import hand_out, recompute_mixers, shard, whole
from twotower.train.processes import ALONE, Processes, joined
from twotower.train.run_folder import POSITION_FILE, RunFolder, ShardedSnapshot
from twotower.train.schedule import Optimizers, make_optimizer
from twotower.train.sharded_checkpoint import save_sharded
from twotower.train.signals import StopSignals
from twotower.train.step import make_loss, step_generator

DENOISER = {"recipe": "denoiser", "init": "x"}
VARIANTS: list[dict[str, object]] = [
    {"recipe": "backbone"},
    DENOISER,
    DENOISER | {"targets": "completion", "blocks_per_row": 3, "t_per": "block"},
    DENOISER | {"loss_weight": "elbo"},
    DENOISER | {"train_context": True, "ar_loss_weight": 0.3},
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A group of one process: all of the sharding without a second one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def batch(num_rows: int) -> Batch:
    """Rows whose completions have different lengths, so that masked tokens are uneven."""
    tokens = random_ids(num_rows, 16)
    ends = torch.arange(num_rows).unsqueeze(1) * 3
    return Batch(tokens=tokens, is_completion=torch.arange(16) >= ends)


@pytest.mark.parametrize("values", VARIANTS, ids=[str(v) for v in VARIANTS])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_shares_of_a_loss_add_up_to_it(values: dict[str, object], count: int) -> None:
    """Silent failure: a mean of means, which favours the tokens of a process with few of them.

    With 6 processes for 4 rows two have nothing to count; their gradient must be zero.
    """
    options = TrainOptions.from_dict(values)
    model, rows = fresh_model(), batch(4)

    def measured(processes: Processes) -> tuple[float, Tensor]:
        loss = make_loss(options, 4, False, options.next_token_weight, processes)
        value = loss(model, rows, step_generator(0, 0, 0))
        (gradient,) = torch.autograd.grad(value, model.context_tower.layers[0].mixer.in_proj.weight)
        return value.item(), gradient

    total, gradient = measured(ALONE)
    parts = [measured(Processes(rank=rank, count=count)) for rank in range(count)]
    assert sum(value for value, _ in parts) == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(sum(part for _, part in parts), gradient, rtol=1e-4, atol=1e-6)
    assert len({value for value, _ in parts}) > 1


def test_every_row_belongs_to_one_process() -> None:
    """Silent failure: rows that two processes train on, or none."""
    for num_rows, count in ((4, 2), (12, 4), (5, 3), (2, 4)):
        parts = [Processes(rank=rank, count=count).part(num_rows) for rank in range(count)]
        seen = [row for rows, weight in parts if weight for row in range(num_rows)[rows]]
        assert seen == list(range(num_rows))
        assert sum(weight for _, weight in parts) == pytest.approx(1.0)


@pytest.mark.parametrize("trains_context", [False, True])
def test_a_sharded_model_has_the_gradients_of_a_plain_one(
    mesh: DeviceMesh, trains_context: bool
) -> None:
    """Silent failure: weights that are freed before a gradient that comes by another way, through
    keys and states, has used them; or frozen ones that every process keeps whole.
    """
    plain, sharded = fresh_model(), fresh_model()
    for model in (plain, sharded):
        model.context_tower.requires_grad_(trains_context)
    shard(sharded, mesh, is_narrow=False)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    recompute_mixers(sharded)
    for _ in range(2):
        gradients = [_gradients(model) for model in (plain, sharded)]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(whole(gradients[1][name]), gradient, rtol=1e-5, atol=1e-7)


def _gradients(model: TwoTower) -> dict[str, Tensor]:
    model.zero_grad()
    t = torch.tensor([0.3, 0.8])
    model.training_logits(random_ids(2, 8), random_ids(2, 8), t, 4).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_only_matrices_travel_in_bfloat16(mesh: DeviceMesh) -> None:
    """Silent failure: decay rates, routers or norms rounded to three digits."""
    model = fresh_model()
    shard(model, mesh, is_narrow=True)
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        # Called after FSDP's own hook: what the module computes with.
        module.register_forward_pre_hook(
            lambda m, _, name=name: seen.update(
                {f"{name}.{n}": p.dtype for n, p in m.named_parameters(recurse=False)}
            )
        )
    with torch.autocast("cpu", torch.bfloat16):
        _gradients(model)
    narrow = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    wide = {name for name, dtype in seen.items() if dtype == torch.float32}
    ends = {name.split(".", 3)[-1] for name in narrow if ".layers." in name}
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj")
    expected = {f"mixer.{name}.weight" for name in (*matrices, "down_proj")}
    shared = {f"mixer.shared_experts.{name}.weight" for name in ("up_proj", "down_proj")}
    stacks = {"mixer.experts.up_proj", "mixer.experts.down_proj"}
    assert ends == expected | shared | stacks
    assert narrow - {n for n in narrow if ".layers." in n} == {"lm_head.weight"}
    for part in ("A_log", "gate.weight", "norm.weight", "t_block.1.weight", "embeddings.weight"):
        assert any(name.endswith(part) for name in wide)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_recomputing_runs_mixers_twice_and_leaves_the_balance_alone() -> None:
    """Silent failure: activations that are kept after all, or experts that count double."""
    plain, lean = fresh_model(), fresh_model()
    recompute_mixers(lean)
    runs: list[nn.Module] = []
    lean.denoiser_tower.layers[0].mixer.in_proj.register_forward_hook(lambda m, *_: runs.append(m))
    balances = [ExpertBalance(model, 0.01) for model in (plain, lean)]
    for model, balance in zip((plain, lean), balances, strict=True):
        _gradients(model)
        balance.update()
    assert len(runs) == 2
    for (name, one), two in zip(plain.named_buffers(), lean.buffers(), strict=True):
        assert torch.equal(one, two), name


def test_sharded_muon_takes_the_steps_of_muon(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Silent failure: orthogonalised shards, which are not rows of the orthogonalised matrix."""
    options = tiny_options(tmp_path, tmp_path, optimizer="muon", learning_rate=0.02)
    plain, sharded = fresh_model(), fresh_model()
    shard(sharded, mesh, is_narrow=False)
    optimizers = [make_optimizer(model, options) for model in (plain, sharded)]
    for _ in range(3):
        _gradients(plain)
        for one, two in zip(plain.parameters(), sharded.parameters(), strict=True):
            if one.grad is not None:  # the very same: Adam and bfloat16 magnify any difference
                two.grad = distribute_tensor(one.grad, mesh, two.placements)
        for optimizer in optimizers:
            optimizer.step()
    before = fresh_model().state_dict()
    for (name, one), two in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(whole(two.detach()), one.detach(), rtol=0, atol=5e-7)
        if one.grad is not None and "mixer" in name and one.ndim == 2:
            assert (one - before[name]).abs().max() > 0.01
    states = [_state_names(optimizer) for optimizer in optimizers]
    assert states[0] == states[1]


def _state_names(optimizers: Optimizers) -> list[list[str]]:
    return [[*state] for part in optimizers.parts for state in part.state.values()]


def test_values_are_handed_out_by_name(mesh: DeviceMesh) -> None:
    model, other = fresh_model(seed=1), fresh_model()
    shard(model, mesh, is_narrow=False)
    hand_out(other.state_dict(), model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(whole(value), other.state_dict()[name])


def test_what_several_processes_cannot_do_is_refused(tmp_path: Path) -> None:
    options = tiny_options(tmp_path, tmp_path, batch_size=4)
    check_divisible(options, 1)
    check_divisible(options, 4)
    with pytest.raises(ValueError, match=r"batch_size: 4 rows .* 3 processes; use a multiple of 3"):
        check_divisible(options, 3)
    compiled = tiny_options(tmp_path, tmp_path, compile=True)
    check_divisible(compiled, 1)
    with pytest.raises(ValueError, match="compile: not with 2 processes"):
        check_divisible(compiled, 2)


def test_further_signals_of_torchrun_change_nothing() -> None:
    """Silent failure: Ctrl-C reaches a process from the terminal and again from torchrun, and the
    second one ends it before it has saved.
    """
    with StopSignals(is_patient=True) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("data") / "shard")


@pytest.fixture
def save_as_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that writes the checkpoints of several."""

    def save(training: loop.Training, folder: RunFolder) -> None:
        keep = training.options.keep_checkpoints
        save_sharded(folder, training.position(), training.state(), keep, ALONE)

    monkeypatch.setattr(loop, "_save", save)
    monkeypatch.setattr(loop, "export", lambda *_: None)


def losses(options: TrainOptions) -> list[tuple[float, float]]:
    lines = read_metrics(RunFolder(options.run_folder).metrics)
    return [(line["step"], line["loss"]) for line in lines]


def test_a_sharded_checkpoint_continues_a_run_exactly(
    data: Path, tmp_path: Path, save_as_several: None
) -> None:
    """Silent failure: moments, momentum, average or position that are not read back."""
    changes = {"ema": 0.9, "optimizer": "muon", "checkpoint_every": 2, "log_every": 1}
    whole_run = tiny_options(data, tmp_path / "whole", steps=7, **changes)
    broken = tiny_options(data, tmp_path / "broken", steps=7, **changes)
    final = [report.loss for report in train(whole_run)][-1]
    steps = train(broken)
    for _ in range(5):
        next(steps)
    del steps
    assert [report.step for report in train(broken)] == [5, 6, 7]
    assert losses(broken) == losses(whole_run) and losses(broken)[-1] == (7, final)
    averages = [loop.begin(o, _rows(o), RunFolder(o.run_folder).open(o)).average
                for o in (whole_run, broken)]  # fmt: skip
    one, two = (average.values for average in averages if average is not None)
    assert all(torch.equal(one[name], two[name]) for name in one)
    names = [path.name for path in sorted(RunFolder(broken.run_folder).checkpoints.iterdir())]
    assert names == ["step-00000006", "step-00000007"]


def _rows(options: TrainOptions) -> loop.Rows:
    return loop.Rows(loop.Shard(options.data), options.sequence_length, options.seed)


def test_a_damaged_folder_gives_way_and_a_half_written_one_is_no_checkpoint(
    data: Path, tmp_path: Path, save_as_several: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Silent failure: a run that goes on from what a kill left half written."""
    options = tiny_options(data, tmp_path / "run", steps=4, checkpoint_every=2)
    list(train(options))
    folder = RunFolder(options.run_folder)
    half = folder.partial(6)
    half.mkdir()
    (half / POSITION_FILE).write_text("{}")
    found = folder.open(options)
    assert isinstance(found, ShardedSnapshot) and found.step == 4
    piece = next(folder.sharded(4).glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1])
    found = folder.open(options)
    assert isinstance(found, ShardedSnapshot) and found.step == 2
    assert f"{piece.name} is damaged" in caplog.text
    folder.drop_all_but(1)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu", "device='gpu' is unknown"), ("cuda:99", "device='cuda:99' is not on this machine")],
)
def test_a_device_that_is_not_there_is_said_before_processes_meet(
    device: str, said: str, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: launched)
    with pytest.raises(ValueError, match=said), joined(device, 1):
        pass


def test_more_processes_than_devices_is_an_error_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"'cuda:1' .* has 1 CUDA devices"), joined("cuda", 1):
        pass
