"""The training loop: a generator of steps that keeps the run folder up to date.

Decides the order of things: gradients, checks, optimiser, metrics, evaluation, checkpoint. A run is
a function of its options and data; stopping it at any point and starting it again changes no
number.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from twotower.train.data import Rows, Shard
from twotower.train.metrics import Metrics
from twotower.train.models import export
from twotower.train.options import TrainOptions
from twotower.train.parallel import clip_gradients
from twotower.train.processes import ALONE, Processes
from twotower.train.run_folder import RunFolder
from twotower.train.schedule import learning_rate
from twotower.train.sharded_checkpoint import save_sharded
from twotower.train.signals import StopSignals
from twotower.train.step import Loss, make_loss, step_generator
from twotower.train.training import Training, begin

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


def train(options: TrainOptions, processes: Processes = ALONE) -> Iterator[StepReport]:
    """Run (or continue) a training, yielding each step once it is recorded and saved.

    Of several processes each calls it, yields the same reports, and the first alone writes metrics
    and the model. Ends early after SIGINT or SIGTERM, saved. ValueError (one line) for unusable
    options, data or checkpoints, and for a loss that is no longer finite.
    """
    processes.on_first(lambda: check_divisible(options, processes.count))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    processes.on_first(lambda: Shard(options.data))
    rows = Rows(Shard(options.data), options.sequence_length, options.seed, options.shift_share)
    folder = RunFolder(options.run_folder)
    found = processes.on_first(lambda: folder.open(options))
    training = begin(options, rows, found, processes)
    is_patient = processes.count > 1
    with _metrics(training, folder) as metrics, StopSignals(is_patient) as stop:
        yield from _run(training, folder, metrics, stop)
    if training.step >= options.steps:
        with training.averaged():
            model = training.whole_model()
            if model is not None:
                export(model, folder.export, options.recipe, rows.shard)


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


@contextmanager
def _metrics(training: Training, folder: RunFolder) -> Iterator[Metrics | None]:
    """The run's record, which the first process keeps; None on the others."""
    if not training.processes.is_first:
        yield None
        return
    log = folder.tensorboard if training.options.tensorboard else None
    with Metrics(folder.metrics, log, training.step) as metrics:
        yield metrics


def _run(
    training: Training, folder: RunFolder, metrics: Metrics | None, stop: StopSignals
) -> Iterator[StepReport]:
    options, processes = training.options, training.processes
    losses = {
        size: make_loss(options, size, options.compile, options.next_token_weight, processes)
        for size in {training.block_size, options.early_block_size or training.block_size}
    }
    durations: deque[float] = deque(maxlen=_RECENT)
    saved_step = training.step
    while training.step < options.steps and not processes.any(stop.requested):
        begin = time.perf_counter()
        result = _optimiser_step(training, losses[training.block_size_now], folder)
        durations.append(time.perf_counter() - begin)
        report = _record(training, result, sum(durations) / len(durations), metrics)
        if _is_due(training.step, options.checkpoint_every, options.steps):
            _save(training, folder)
            saved_step = training.step
        yield report
    if saved_step != training.step:
        _save(training, folder)


def _save(training: Training, folder: RunFolder) -> None:
    keep, processes = training.options.keep_checkpoints, training.processes
    if processes.count == 1:
        folder.save(training.snapshot(), keep)
    else:
        save_sharded(folder, training.position(), training.state(), keep, processes)


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
        batch = training.rows.training(start, options.batch_size).to(training.device)
        generator = step_generator(options.seed, training.step, micro)
        with autocast(options):
            value = loss(training.model, batch, generator) / options.accumulate
        value.backward()
        total += value.item()
    total = training.processes.add_number(total)
    norm = clip_gradients(training.parameters, options.grad_clip)
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise training.processes.error(_not_finite(training, folder, total, norm))
    training.optimizer.step()
    for counts in training.balance.counts.values():
        counts.copy_(training.processes.add(counts.cpu()))
    training.balance.update()
    training.step += 1
    if training.average is not None:
        training.average.update(training.step)
    training.rows_read += options.rows_per_step
    training.pending_losses.append(total)
    return _StepResult(loss=total, grad_norm=norm, learning_rate=rate)


def _not_finite(training: Training, folder: RunFolder, loss: float, norm: float) -> str:
    first, count = training.rows_read, training.options.rows_per_step
    newest = folder.newest()
    kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
    return (
        f"loss: {loss} with gradient norm {norm} at step {training.step + 1}, rows {first} to "
        f"{first + count - 1} of the training order; stopped, {kept}: "
        "lower learning_rate or check the data and weights"
    )


def _record(
    training: Training, result: _StepResult, step_s: float, metrics: Metrics | None
) -> StepReport:
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
        if metrics is not None:
            metrics.write(step, values)
        training.pending_losses = []
    validation = None
    if options.eval_every and _is_due(step, options.eval_every, options.steps):
        validation = evaluate(training)
        if metrics is not None:
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
    loss = make_loss(options, training.block_size, compile=False, processes=training.processes)
    count = min(options.eval_rows, training.rows.num_held_out)
    total = 0.0
    with training.averaged(), autocast(options):
        for start in range(0, count, options.batch_size):
            batch = training.rows.held_out(start, min(options.batch_size, count - start))
            generator = step_generator(options.seed, _EVALUATION, start)
            value = loss(training.model, batch.to(training.device), generator)
            total += value.item() * len(batch.tokens)
    return training.processes.add_number(total) / count


def autocast(options: TrainOptions) -> torch.autocast:
    """bfloat16 for matrix products where the options ask for it; otherwise it does nothing."""
    kind = torch.device(options.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16")


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
