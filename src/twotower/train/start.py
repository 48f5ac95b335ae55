"""How a run begins: fresh or resumed, on one process or several.

Several processes begin from what the first has made, which hands every one its rows, or each reads
its rows of a checkpoint; none but the first ever holds the whole model in memory.
"""

import json
import logging
from pathlib import Path

from twotower.config import TwoTowerConfig
from twotower.model.two_tower import TwoTower
from twotower.specs import MoESpec
from twotower.train.data import Rows
from twotower.train.models import empty_model, new_config, starting_model
from twotower.train.optimizer import WeightAverage, make_optimizer
from twotower.train.options import TrainOptions
from twotower.train.parallel import hand_out, recompute_mixers, shard, whole
from twotower.train.processes import Processes
from twotower.train.run_folder import RunFolder
from twotower.train.state import (
    Checkpoint,
    TrainState,
    config_of,
    config_values,
    load_state,
    read_checkpoint,
)

_log = logging.getLogger(__name__)


def check_divisible(options: TrainOptions, count: int) -> None:
    """ValueError for options that several processes cannot follow."""
    if options.batch_size % count:
        raise ValueError(
            f"batch_size: {options.batch_size} rows cannot be split evenly over {count} processes; "
            f"use a multiple of {count}"
        )
    if options.compile and count > 1:
        raise ValueError(
            f"compile: not with {count} processes, whose gathering of weights breaks the graph at "
            "every matrix; leave it out"
        )


def begin(options: TrainOptions, rows: Rows, folder: RunFolder, processes: Processes) -> TrainState:
    """A run at its start, or where its newest checkpoint left it."""
    found = _find(options, rows, folder, processes)
    if found is not None:
        model = _placed(empty_model(options, found.config), options, processes)
    elif processes.count == 1:
        model = _placed(starting_model(options, rows.shard), options, processes)
    else:
        model = _handed_out(options, rows, processes)
    processes.on_first(lambda: _check_block_sizes(options, model.config))
    _check_balance(options, model)
    average = WeightAverage(model, options.ema_decay) if options.ema_decay > 0.0 else None
    state = TrainState(model=model, optimizer=make_optimizer(model, options), average=average)
    if found is not None:
        processes.together(lambda: load_state(found, state))
    if options.activation_checkpointing:
        recompute_mixers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _log.info(
        "recipe=%s parameters=%d tokens_per_step=%d rows=%d dtype=%s compile=%s from_step=%d "
        "processes=%d",
        options.recipe, trained, options.tokens_per_step, rows.num_training,
        options.dtype, options.compile, state.step, processes.count,
    )  # fmt: skip
    return state


def whole_model(model: TwoTower, options: TrainOptions, processes: Processes) -> TwoTower | None:
    """The model with all its weights, on the first process's CPU; None on the others."""
    if processes.count == 1:
        return model
    values = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)  # every process takes part, one keeps it
        if processes.is_first:
            values[name] = full.cpu()
    if not processes.is_first:
        return None
    gathered = empty_model(options, model.config)
    gathered.load_state_dict(values)
    return gathered


def denoiser_block_size(options: TrainOptions, config: TwoTowerConfig) -> int:
    """Tokens per block that the denoiser is trained for."""
    return options.block_size or config.block_size


def _find(
    options: TrainOptions, rows: Rows, folder: RunFolder, processes: Processes
) -> Checkpoint | None:
    """The checkpoint to go on from, which the first process chooses."""

    def choose() -> str | None:
        found = folder.open(options)
        if found is None:
            return None
        if found.rows_fingerprint != rows.fingerprint:
            raise ValueError(
                f"data: {rows.shard.folder} is not what the run was trained on; "
                "give its shard, or another output folder"
            )
        if options.init is None and new_config(options, rows.shard) != found.config:
            raise ValueError(
                f"{'preset' if options.config is None else 'config'}: describes another model now "
                f"than that of the run in {folder.path}; use another output folder"
            )
        return str(found.folder)

    path = processes.share(processes.on_first(choose))
    return None if path is None else processes.together(lambda: read_checkpoint(Path(path)))


def _handed_out(options: TrainOptions, rows: Rows, processes: Processes) -> TwoTower:
    """A new model that the first process makes, on its CPU, of which each gets its rows."""
    made = processes.on_first(lambda: starting_model(options, rows.shard))
    config = processes.share(json.dumps(config_values(made.config)) if made else None)
    assert config is not None
    empty = empty_model(options, config_of(json.loads(config)))
    model = _placed(empty, options, processes)
    hand_out(made.state_dict() if made else None, model.state_dict())
    return model


def _placed(model: TwoTower, options: TrainOptions, processes: Processes) -> TwoTower:
    """The model on its device, or this process's rows of it."""
    if processes.count == 1:
        return model.to(processes.device or options.device)
    assert processes.mesh is not None
    shard(model, processes.mesh, is_narrow=options.dtype == "bfloat16")
    return model


def _check_balance(options: TrainOptions, model: TwoTower) -> None:
    """ValueError for the balance of experts in a model that has none to balance."""
    if options.load_balance_rate == TrainOptions.load_balance_rate:
        return
    routers = {spec.router for spec in model.config.context.layers_of(MoESpec)}
    if "sigmoid" not in routers:
        what = "whose routers are a softmax" if routers else "without experts"
        raise ValueError(f"load_balance_rate: no effect on a model {what}; leave it out")


def _check_block_sizes(options: TrainOptions, config: TwoTowerConfig) -> None:
    if options.recipe == "backbone":
        return
    block_size, early = denoiser_block_size(options, config), options.early_block_size
    if early == block_size:
        raise ValueError(f"early_block_size: {block_size} is the model's own; leave it out")
    for name, size in (("block_size", block_size), ("early_block_size", early)):
        if size is not None and options.sequence_length % size:
            raise ValueError(
                f"sequence_length: {options.sequence_length} is not a multiple of {name}={size}"
            )
