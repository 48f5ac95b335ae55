"""The state that training changes, and how it begins: fresh, resumed, on one process or several.

Several processes begin from what the first has made or read, which hands every one its rows; no
other holds the whole model in memory at any time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from twotower.config import TwoTowerConfig
from twotower.families import config_to_dict
from twotower.model.two_tower import TwoTower
from twotower.train.average import WeightAverage
from twotower.train.balance import ExpertBalance
from twotower.train.data import Rows
from twotower.train.models import empty_model, starting_model
from twotower.train.options import TrainOptions
from twotower.train.parallel import hand_out, recompute_mixers, shard, whole
from twotower.train.processes import ALONE, Processes
from twotower.train.run_folder import Position, ShardedSnapshot, Snapshot, model_config
from twotower.train.schedule import Optimizers, make_optimizer
from twotower.train.sharded_checkpoint import State, load_sharded

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training:
    """The state that a step changes; of several processes, this one's part of it."""

    options: TrainOptions
    rows: Rows
    model: TwoTower
    optimizer: Optimizers
    block_size: int
    processes: Processes = ALONE
    average: WeightAverage | None = None
    step: int = 0
    rows_read: int = 0
    pending_losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.balance = ExpertBalance(self.model, self.options.expert_balance)
        if self.options.ema > 0.0:
            self.average = WeightAverage(self.model, self.options.ema)

    @property
    def device(self) -> str:
        """Where this process computes."""
        return self.processes.device or self.options.device

    @property
    def block_size_now(self) -> int:
        """Tokens per block of the next step."""
        early = self.options.early_block_size
        is_early = self.step < round(self.options.early_share * self.options.steps)
        return early if early is not None and is_early else self.block_size

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered, the model has the weights that are evaluated and exported."""
        if self.average is None:
            yield
        else:
            with self.average.in_the_model():
                yield

    def position(self) -> Position:
        return Position(
            step=self.step,
            rows_read=self.rows_read,
            rows_fingerprint=self.rows.fingerprint,
            config=config_to_dict(self.model.config),
            pending_losses=self.pending_losses,
        )

    def snapshot(self) -> Snapshot:
        """All of it, of a single process."""
        return Snapshot(
            **vars(self.position()),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            average={} if self.average is None else self.average.values,
        )

    def state(self) -> State:
        """The tensors of a checkpoint of several processes, all under their parameters' names."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer.parts),
            "average": {} if self.average is None else dict(self.average.values),
        }

    def load_state(self, state: State) -> None:
        """Take over what `state()` gave; the average's tensors were changed in place."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer.parts, state["optimizer"])

    def restore(self, found: Snapshot | ShardedSnapshot) -> None:
        """Continue from a checkpoint; ValueError if it was trained on other data."""
        self.restore_position(found)
        if isinstance(found, ShardedSnapshot):
            state = self.state()
            load_sharded(found.folder, state)
            self.load_state(state)
            return
        self.model.load_state_dict(found.model)
        self.optimizer.load_state_dict(dict(found.optimizer))
        if self.average is not None:
            self.average.restore(found.average)

    def restore_position(self, found: Position) -> None:
        """Step and rows of a checkpoint; ValueError if they are other data's."""
        _check_same_rows(self.rows, found)
        self.step, self.rows_read = found.step, found.rows_read
        self.pending_losses = list(found.pending_losses)

    def whole_model(self) -> TwoTower | None:
        """The model with all its weights, on the first process's CPU; None on the others."""
        if self.processes.count == 1:
            return self.model
        values = {}
        for name, tensor in self.model.state_dict().items():
            full = whole(tensor)  # every process takes part, one keeps it
            if self.processes.is_first:
                values[name] = full.cpu()
        if not self.processes.is_first:
            return None
        model = empty_model(self.options, self.model.config)
        model.load_state_dict(values)
        return model


def begin(
    options: TrainOptions,
    rows: Rows,
    found: Snapshot | ShardedSnapshot | None,
    processes: Processes = ALONE,
) -> Training:
    """A training at its start, or where a checkpoint left it; `found` is the first process's."""
    if processes.count == 1:
        training = _begin_alone(options, rows, found)
    else:
        training = _begin_together(options, rows, found, processes)
    if options.recompute:
        recompute_mixers(training.model)
    trained = sum(parameter.numel() for parameter in training.parameters)
    _log.info(
        "recipe=%s parameters=%d tokens_per_step=%d rows=%d dtype=%s compile=%s from_step=%d "
        "processes=%d",
        options.recipe, trained, options.tokens_per_step, rows.num_training,
        options.dtype, options.compile, training.step, processes.count,
    )  # fmt: skip
    return training


def _begin_alone(
    options: TrainOptions, rows: Rows, found: Snapshot | ShardedSnapshot | None
) -> Training:
    model = starting_model(options, rows.shard.meta.vocab_size, found).to(options.device)
    training = _training(options, rows, model, ALONE)
    if found is not None:
        training.restore(found)
    return training


def _begin_together(
    options: TrainOptions,
    rows: Rows,
    found: Snapshot | ShardedSnapshot | None,
    processes: Processes,
) -> Training:
    """The first process begins alone, on its CPU, but for a checkpoint that all can read."""
    position = processes.broadcast(_position(found))
    if isinstance(position, ShardedSnapshot):
        config = model_config(position)
        processes.on_first(lambda: _check(options, rows, config, position))
        training = _training(options, rows, _sharded_model(options, config, processes), processes)
        training.restore(position)
        return training
    on_cpu = dataclasses.replace(options, device="cpu")
    alone = processes.on_first(lambda: _begin_alone(on_cpu, rows, found))
    made = processes.broadcast(alone.model.config if alone else None)
    assert made is not None
    model = _sharded_model(options, made, processes)
    hand_out(alone.model.state_dict() if alone else None, model.state_dict())
    training = _training(options, rows, model, processes)
    if position is not None:
        training.restore_position(position)
        _take_over(training, alone.state() if alone else None)
    return training


def _position(found: Snapshot | ShardedSnapshot | None) -> Position | None:
    """What the other processes need to know of it: no tensors."""
    if not isinstance(found, Snapshot):
        return found
    names = [field.name for field in dataclasses.fields(Position)]
    return Position(**{name: getattr(found, name) for name in names})


def _sharded_model(options: TrainOptions, config: TwoTowerConfig, processes: Processes) -> TwoTower:
    model = empty_model(options, config)
    assert processes.mesh is not None
    shard(model, processes.mesh, is_narrow=options.dtype == "bfloat16")
    return model


def _take_over(training: Training, first: State | None) -> None:
    """Take this process's part of optimiser and average from the first one's whole state."""
    state = training.state()
    for name, values in state["optimizer"]["state"].items():
        hand_out(first and first["optimizer"]["state"][name], values)
    groups = training.processes.broadcast(first and first["optimizer"]["param_groups"])
    state["optimizer"]["param_groups"] = groups
    hand_out(first and first["average"], state["average"])
    training.load_state(state)


def _training(options: TrainOptions, rows: Rows, model: TwoTower, processes: Processes) -> Training:
    block_size = options.block_size or model.config.block_size
    _check_block_sizes(options, block_size)
    return Training(
        options=options,
        rows=rows,
        model=model,
        optimizer=make_optimizer(model, options),
        block_size=block_size,
        processes=processes,
    )


def _check(options: TrainOptions, rows: Rows, config: TwoTowerConfig, found: Position) -> None:
    """ValueError if the run cannot go on with these options and data."""
    _check_same_rows(rows, found)
    _check_block_sizes(options, options.block_size or config.block_size)


def _check_same_rows(rows: Rows, found: Position) -> None:
    if found.rows_fingerprint != rows.fingerprint:
        raise ValueError(
            f"data: {rows.shard.folder} is not what the run was trained on; "
            "give its shard, or another --out"
        )


def _check_block_sizes(options: TrainOptions, block_size: int) -> None:
    if options.recipe == "backbone":
        return
    if options.early_block_size == block_size:
        raise ValueError(f"early_block_size: {block_size} is the model's own; leave it out")
    for name, size in (("block_size", block_size), ("early_block_size", options.early_block_size)):
        if size is not None and options.sequence_length % size:
            raise ValueError(
                f"sequence_length: {options.sequence_length} is not a multiple of {name}={size}"
            )
