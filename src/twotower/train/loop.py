"""The training loop: a generator of steps that keeps the run folder up to date.

Decides the order of things: gradients, checks, optimiser, metrics, evaluation, checkpoint. A run is
a function of its options and data; stopping it at any point and starting it again changes no
number.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from twotower.model.balance import ExpertBalance
from twotower.model.two_tower import TwoTower
from twotower.train.average import WeightAverage
from twotower.train.data import Rows, Shard
from twotower.train.metrics import Metrics
from twotower.train.models import export, starting_model
from twotower.train.options import TrainOptions
from twotower.train.run_folder import RunFolder, Snapshot
from twotower.train.schedule import Optimizers, learning_rate, make_optimizer
from twotower.train.signals import StopSignals
from twotower.train.step import Loss, make_loss, step_generator

_log = logging.getLogger(__name__)
_EVALUATION = 1 << 40  # in the place of a step: the noise of every evaluation is the same
_RECENT = 20  # steps over which the speed is averaged


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished optimiser step; `validation_loss` only where it was measured."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    eta_s: float
    is_logged: bool
    validation_loss: float | None


@dataclass(kw_only=True)
class Training:
    """The state that a step changes."""

    options: TrainOptions
    rows: Rows
    model: TwoTower
    optimizer: Optimizers
    block_size: int
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
    def block_size_now(self) -> int:
        """Tokens per block of the next step."""
        early = self.options.early_block_size
        is_early = self.step < round(self.options.early_share * self.options.steps)
        return early if early is not None and is_early else self.block_size

    def averaged(self) -> AbstractContextManager[None]:
        """While entered, the model has the weights that are evaluated and exported."""
        return nullcontext() if self.average is None else self.average.in_the_model()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            step=self.step,
            rows_read=self.rows_read,
            rows_fingerprint=self.rows.fingerprint,
            config=self.model.config.to_dict(),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            pending_losses=self.pending_losses,
            average={} if self.average is None else self.average.values,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a checkpoint; ValueError if it was trained on other data."""
        if snapshot.rows_fingerprint != self.rows.fingerprint:
            raise ValueError(
                f"data: {self.rows.shard.folder} is not what the run was trained on; "
                "give its shard, or another --out"
            )
        self.model.load_state_dict(snapshot.model)
        self.optimizer.load_state_dict(dict(snapshot.optimizer))
        if self.average is not None:
            self.average.restore(snapshot.average)
        self.step, self.rows_read = snapshot.step, snapshot.rows_read
        self.pending_losses = list(snapshot.pending_losses)


def train(options: TrainOptions) -> Iterator[StepReport]:
    """Run (or continue) a training, yielding each step once it is recorded and saved.

    Ends early after SIGINT or SIGTERM, saved. ValueError (one line) for unusable options, data or
    checkpoints, and for a loss that is no longer finite.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shard = Shard(options.data)
    rows = Rows(shard, options.sequence_length, options.seed, options.shift_share)
    folder = RunFolder(options.run_folder)
    snapshot = folder.open(options)
    training = _begin(options, rows, snapshot)
    log = folder.tensorboard if options.tensorboard else None
    with Metrics(folder.metrics, log, training.step) as metrics, StopSignals() as stop:
        yield from _run(training, folder, metrics, stop)
    if training.step >= options.steps:
        with training.averaged():
            export(training.model, folder.export, options.recipe, shard)


def _begin(options: TrainOptions, rows: Rows, snapshot: Snapshot | None) -> Training:
    model = starting_model(options, rows.shard.meta.vocab_size, snapshot).to(options.device)
    block_size = options.block_size or model.config.block_size
    _check_block_sizes(options, block_size)
    training = Training(
        options=options,
        rows=rows,
        model=model,
        optimizer=make_optimizer(model, options),
        block_size=block_size,
    )
    if snapshot is not None:
        training.restore(snapshot)
    trained = sum(parameter.numel() for parameter in training.parameters)
    _log.info(
        "recipe=%s parameters=%d tokens_per_step=%d rows=%d dtype=%s compile=%s from_step=%d",
        options.recipe, trained, options.tokens_per_step, rows.num_training,
        options.dtype, options.compile, training.step,
    )  # fmt: skip
    return training


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


def _run(
    training: Training, folder: RunFolder, metrics: Metrics, stop: StopSignals
) -> Iterator[StepReport]:
    options = training.options
    losses = {
        size: make_loss(options, size, options.compile, options.next_token_weight)
        for size in {training.block_size, options.early_block_size or training.block_size}
    }
    durations: deque[float] = deque(maxlen=_RECENT)
    saved_step = training.step
    while training.step < options.steps and not stop.requested:
        begin = time.perf_counter()
        result = _optimiser_step(training, losses[training.block_size_now], folder)
        durations.append(time.perf_counter() - begin)
        report = _record(training, result, sum(durations) / len(durations), metrics)
        if _is_due(training.step, options.checkpoint_every, options.steps):
            folder.save(training.snapshot(), options.keep_checkpoints)
            saved_step = training.step
        yield report
    if saved_step != training.step:
        folder.save(training.snapshot(), options.keep_checkpoints)


@dataclass(frozen=True, kw_only=True)
class _StepResult:
    loss: float
    grad_norm: float
    learning_rate: float


def _optimiser_step(training: Training, loss: Loss, folder: RunFolder) -> _StepResult:
    """Accumulate gradients over the passes of one step, check them, and move the weights."""
    options = training.options
    rate = learning_rate(training.step, options)
    training.optimizer.set_learning_rate(rate)
    training.optimizer.zero_grad()
    training.balance.reset()
    total = 0.0
    for micro in range(options.accumulate):
        start = training.rows_read + micro * options.batch_size
        batch = training.rows.training(start, options.batch_size).to(options.device)
        generator = step_generator(options.seed, training.step, micro)
        with autocast(options):
            value = loss(training.model, batch, generator) / options.accumulate
        value.backward()
        total += value.item()
    norm = nn.utils.clip_grad_norm_(training.parameters, options.grad_clip or math.inf).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise ValueError(_not_finite(training, folder, total, norm))
    training.optimizer.step()
    training.balance.update()
    training.step += 1
    if training.average is not None:
        training.average.update(training.step)
    training.rows_read += options.rows_per_step
    training.pending_losses.append(total)
    return _StepResult(loss=total, grad_norm=norm, learning_rate=rate)


def _not_finite(training: Training, folder: RunFolder, loss: float, norm: float) -> str:
    first, count = training.rows_read, training.options.rows_per_step
    return (
        f"loss: {loss} with gradient norm {norm} at step {training.step + 1}, rows {first} to "
        f"{first + count - 1} of the training order; stopped, the last good checkpoint is "
        f"{folder.newest() or 'none yet'}: lower learning_rate or check the data and weights"
    )


def _record(training: Training, result: _StepResult, step_s: float, metrics: Metrics) -> StepReport:
    """Write the metric lines that are due after this step, evaluating if it is time."""
    options, step = training.options, training.step
    tokens_per_s = options.tokens_per_step / step_s
    is_logged = _is_due(step, options.log_every, options.steps)
    if is_logged:
        values = {
            "loss": sum(training.pending_losses) / len(training.pending_losses),
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": training.rows_read * options.sequence_length,
            "tokens_per_s": round(tokens_per_s, 1),
        }
        metrics.write(step, values)
        training.pending_losses = []
    validation = None
    if options.eval_every and _is_due(step, options.eval_every, options.steps):
        validation = evaluate(training)
        metrics.write(step, {"validation_loss": validation})
    return StepReport(
        step=step,
        steps=options.steps,
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        tokens_per_s=tokens_per_s,
        eta_s=(options.steps - step) * step_s,
        is_logged=is_logged,
        validation_loss=validation,
    )


@torch.no_grad()
def evaluate(training: Training) -> float:
    """Mean loss over the first `eval_rows` held-out rows, with the same noise every time.

    A denoiser's is its own alone, without the context tower's, so that variants compare.
    """
    options = training.options
    loss = make_loss(options, training.block_size, compile=False)
    count = min(options.eval_rows, training.rows.num_held_out)
    total = 0.0
    with training.averaged(), autocast(options):
        for start in range(0, count, options.batch_size):
            batch = training.rows.held_out(start, min(options.batch_size, count - start))
            generator = step_generator(options.seed, _EVALUATION, start)
            value = loss(training.model, batch.to(options.device), generator)
            total += value.item() * len(batch.tokens)
    return total / count


def autocast(options: TrainOptions) -> torch.autocast:
    """bfloat16 for matrix products where the options ask for it; otherwise it does nothing."""
    kind = torch.device(options.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16")


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
