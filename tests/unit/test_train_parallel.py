"""A model on several processes, as far as one process can tell: shares, shards, Muon, checkpoints.

Runs of several processes are tests/e2e/test_train_parallel.py's business.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from tiny_adapt import thin, unordered
from tiny_models import fresh_model, random_ids
from tiny_training import tiny_options
from twotower.model.thin import trained_parameters
from twotower.model.two_tower import TwoTower
from twotower.train.data import Batch
from twotower.train.drafts import reader_of
from twotower.train.loop import accumulate_gradients
from twotower.train.objective import MaskedBlocks, NextToken, row_noise
from twotower.train.optimizer import ExpertBalance, Optimizers, WeightAverage, make_optimizer
from twotower.train.options import DiffusionObjectiveOptions
from twotower.train.parallel import hand_out, recompute_mixers, shard, whole
from twotower.train.processes import ALONE, Processes, SharedError, StopSignals, joined
from twotower.train.start import check_divisible
from twotower.train.state import (
    TrainState,
    load_state,
    read_checkpoint,
    write_description,
    write_part,
)

VARIANTS: list[dict[str, Any] | None] = [
    None,  # next-token training
    {},
    {"targets": "completion", "denoised_blocks_per_row": 3, "mask_rate_per": "block"},
    {"loss_weight": "elbo"},
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


class OfSeveral(Processes):
    """One of several processes that is asked after the others have said what they count."""

    def add(self, values: Tensor) -> Tensor:
        return COUNTED if self.count > 1 else values


COUNTED = torch.zeros(0)


@pytest.mark.parametrize("values", VARIANTS, ids=str)
@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_a_loss_add_up_to_it(
    values: dict[str, Any] | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: a mean of means, which favours the tokens of a process with few of them."""
    model, rows = fresh_model(), batch(4)
    precision = torch.autocast("cpu", enabled=False)
    objective: Any = NextToken()
    if values is not None:
        objective = MaskedBlocks(DiffusionObjectiveOptions(**values), 4, 3, ar_weight=0.3)

    def drawn(own: range) -> Any:
        part = Batch(
            tokens=rows.tokens[own.start : own.stop],
            is_completion=rows.is_completion[own.start : own.stop],
        )
        return objective.draw(part, row_noise(0, 0, own))

    def measured(processes: Processes) -> tuple[float, Tensor]:
        model.zero_grad()
        own = drawn(processes.own_rows(0, 4))
        loss = accumulate_gradients(model, objective, [own], precision, "cpu", processes)
        gradient = model.context_tower.layers[0].mixer.in_proj.weight.grad
        assert gradient is not None
        return loss, gradient.clone()

    total, gradient = measured(ALONE)
    monkeypatch.setitem(globals(), "COUNTED", drawn(range(4)).counts)
    monkeypatch.setattr(OfSeveral, "add_number", lambda self, value: value)
    parts = [measured(OfSeveral(rank=rank, count=count)) for rank in range(count)]
    assert sum(value for value, _ in parts) == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(sum(part for _, part in parts), gradient, rtol=1e-4, atol=1e-6)
    assert len({value for value, _ in parts}) > 1


def test_every_row_belongs_to_one_process() -> None:
    """Silent failure: rows that two processes train on, or none."""
    for num_rows, count in ((4, 2), (12, 4), (5, 3), (2, 4)):
        parts = [Processes(rank=rank, count=count).own_rows(7, num_rows) for rank in range(count)]
        assert [row for part in parts for row in part] == list(range(7, 7 + num_rows))


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


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_sharded_thin_denoiser_has_the_gradients_of_a_plain_one(
    mesh: DeviceMesh, tmp_path: Path, backend: str
) -> None:
    """Silent failure: what it reads is computed with rows of weights, or before they came."""
    plain, sharded = (thin(unordered()) for _ in range(2))
    for model in (plain, sharded):
        trained_parameters(model)
    shard(sharded, mesh, is_narrow=False)
    several = Processes(rank=0, count=2, mesh=mesh)
    values = {"recipe": "denoiser", "init": "here", "reads": (2, 3, 6), "preset": None}
    options = tiny_options(tmp_path, tmp_path, **values, backend=backend)
    rows, index = random_ids(2, 20), torch.tensor([[2, 0], [1, 3]])
    clean, gradients = rows.unflatten(1, (-1, 5))[torch.arange(2)[:, None], index], []
    for model, processes in ((plain, ALONE), (sharded, several)):
        read = reader_of(model, options, processes)
        for _ in range(2):
            model.zero_grad()
            logits = model.draft_logits(read(rows, 5, index), clean, index * 5)
            logits.square().mean().backward()
        named = model.named_parameters()
        gradients.append({n: whole(p.grad) for n, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 15
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


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
    options = tiny_options(tmp_path, tmp_path, optimizer="muon")
    plain, sharded = fresh_model(), fresh_model()
    shard(sharded, mesh, is_narrow=False)
    optimizers = [make_optimizer(model, options) for model in (plain, sharded)]
    for _ in range(3):
        _gradients(plain)
        for one, two in zip(plain.parameters(), sharded.parameters(), strict=True):
            if one.grad is not None:  # the very same: Adam and bfloat16 magnify any difference
                two.grad = distribute_tensor(one.grad, mesh, two.placements)
        for optimizer in optimizers:
            optimizer.set_learning_rate(0.02)
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


def sharded_state(mesh: DeviceMesh | None, seed: int) -> TrainState:
    model = fresh_model(seed=seed)
    if mesh is not None:
        shard(model, mesh, is_narrow=False)
    options = tiny_options(Path(), Path(), optimizer="muon")
    average = WeightAverage(model, 0.5)
    return TrainState(model=model, optimizer=make_optimizer(model, options), average=average)


@pytest.mark.parametrize("then_sharded", [False, True])
@pytest.mark.parametrize("first_sharded", [False, True])
def test_a_checkpoint_is_read_however_it_was_written(
    mesh: DeviceMesh, tmp_path: Path, first_sharded: bool, then_sharded: bool
) -> None:
    """Silent failure: moments, momentum or average that are left behind between one process and
    several; a rule for the rows of a process that is not FSDP's.
    """
    first = sharded_state(mesh if first_sharded else None, seed=1)
    _gradients(first.model)
    first.optimizer.set_learning_rate(0.02)
    first.optimizer.step()
    assert first.average is not None
    first.average.update(1)
    first.step, first.rows_read = 1, 4
    write_part(tmp_path, first, 0, 1)
    write_description(tmp_path, first, "rows")
    then = sharded_state(mesh if then_sharded else None, seed=2)
    load_state(read_checkpoint(tmp_path), then)
    one, two = first.tensors(), then.tensors()
    assert one.keys() == two.keys() and len(one) > 100
    for name, value in one.items():
        assert torch.equal(whole(two[name]), whole(value)), name
        assert isinstance(two[name], DTensor) == (
            then_sharded and two[name].dim() > 0 and "e_score_correction" not in name
        ), name


class WithAFailingPeer(Processes):
    """Process 0 of two, of which the other one has failed."""

    def add(self, values: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0])

    def share(self, text: str | None, source: int = 0) -> str | None:
        return "what the other one found" if source == 1 else None


def test_the_error_of_another_process_is_raised_here() -> None:
    """Silent failure: a process goes on alone after another's error, and waits for it for ever."""
    with pytest.raises(SharedError, match="what the other one found"):
        WithAFailingPeer(rank=0, count=2).together(lambda: 3)


def test_text_and_errors_are_everybodys(mesh: DeviceMesh) -> None:
    """Silent failure: a process goes on alone after another's error, and waits for it for ever."""
    one = Processes(rank=0, count=2, mesh=mesh)  # of a group of one: the other one is silent
    for text in ("runs/a \u00fc", "", None):
        assert one.share(text) == text
    assert one.together(lambda: 3) == 3

    def fail() -> None:
        raise OSError(28, "No space\nleft")

    for act in (one.together, one.on_first):
        with pytest.raises(SharedError, match="No space left"):
            act(fail)


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
    found = {"current_accelerator": lambda **_: torch.device("cuda"), "device_count": lambda: 1}
    for name, answer in found.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match=r"'cuda:1' is not .*; use cpu or cuda:0$"),
        joined("cuda", 1),
    ):
        pass
