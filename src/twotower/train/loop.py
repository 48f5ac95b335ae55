"""The training loop: a generator of steps that keeps the run folder up to date.

Decides the order of things: gradients, checks, optimiser, metrics, evaluation, checkpoint. A run is
a function of its options and data; stopping it at any point and starting it again changes no
number. What is learnt from a batch is its `Objective`'s business.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twotower.arguments import require
from twotower.checkpoint import resolve
from twotower.families import read_config
from twotower.file_lock import only_writer
from twotower.model.two_tower import TwoTower
from twotower.train.data import Rows
from twotower.train.drafts import DraftedBlocks, reader_of
from twotower.train.models import export
from twotower.train.objective import InputsT, MaskedBlocks, NextToken, Objective, row_noise
from twotower.train.optimizer import ExpertBalance, learning_rate
from twotower.train.options import TrainOptions
from twotower.train.parallel import clip_gradients
from twotower.train.processes import ALONE, Processes, StopSignals
from twotower.train.run_folder import Metrics, RunFolder
from twotower.train.shard import Shard
from twotower.train.start import begin, check_divisible, denoiser_block_size, whole_model
from twotower.train.state import TrainState

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


def train_model(options: TrainOptions) -> Path:
    """Train to the end, or go on with a run that was stopped; returns the exported model's folder.

    `train_steps` is the same as a generator of reports. ValueError (one line) as there;
    KeyboardInterrupt after Ctrl-C or SIGTERM, when the run is saved.
    """
    require("options", options, TrainOptions, "TrainOptions(recipe=...)")
    folder, step = RunFolder(options.run_folder), options.steps
    for report in train_steps(options):
        step = report.step
    if step < options.steps:
        raise KeyboardInterrupt(f"{folder.path}: saved at step {step} of {options.steps}")
    return folder.export


def train_steps(options: TrainOptions, processes: Processes = ALONE) -> Iterator[StepReport]:
    """Train, or go on with a run that was stopped, yielding each step once it is recorded and
    saved; then write the model to the run folder's `export`.

    Of several processes each calls it, yields the same reports, and the first alone writes metrics
    and the model. Ends early after SIGINT or SIGTERM, saved. ValueError (one line) for unusable
    options, data or checkpoints, and for a loss that is no longer finite.
    """
    require("options", options, TrainOptions, "TrainOptions(recipe=...)")
    require("processes", processes, Processes, "what twotower.train.processes.joined() yields")
    processes.on_first(lambda: check_divisible(options, processes.count))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    processes.on_first(lambda: _require_readable(options))
    length, fraction = options.sequence_length, options.unaligned_row_fraction
    rows = processes.together(lambda: Rows(Shard(options.data), length, options.seed, fraction))
    folder = RunFolder(options.run_folder)
    with ExitStack() as held:
        processes.on_first(lambda: held.enter_context(only_writer(folder.path)))
        yield from _train(options, processes, rows, folder)


def _train(
    options: TrainOptions, processes: Processes, rows: Rows, folder: RunFolder
) -> Iterator[StepReport]:
    """The run in its folder, which nobody else writes meanwhile."""
    state = begin(options, rows, folder, processes)
    objective_at, evaluation = objectives(options, state.model, processes)
    tensorboard = folder.tensorboard if options.tensorboard else None
    recorded = Metrics(folder.metrics, tensorboard, state.step) if processes.is_first else None
    with recorded or nullcontext():
        run = Run(
            options=options,
            rows=rows,
            state=state,
            objective_at=objective_at,
            evaluation=evaluation,
            folder=folder,
            metrics=recorded,
            processes=processes,
        )
        yield from run.steps()
    if state.step >= options.steps:
        with state.averaged():
            model = whole_model(state.model, options, processes)
            if model is not None:
                export(model, folder.export, options, rows.shard)


def _require_readable(options: TrainOptions) -> None:
    """ValueError for a model of another family; a resumed run needs no initial checkpoint."""
    if options.init is not None and options.init.exists():
        read_config(resolve(options.init, field="init"))
    if options.config is not None:
        read_config(options.config)


def objectives(
    options: TrainOptions, model: TwoTower, processes: Processes
) -> tuple[Callable[[int], Objective[Any]], Objective[Any]]:
    """What each step learns, by its number, and what evaluation measures.

    A denoiser's validation loss is its own alone, without the context tower's, so that variants
    compare.
    """
    if options.recipe == "backbone":
        next_token = NextToken(options.compile)
        return lambda step: next_token, NextToken()
    mask, size = model.config.mask_token_id, denoiser_block_size(options, model.config)
    if model.config.draft is not None:
        drafts = DraftedBlocks(options, size, reader_of(model, options, processes))
        return lambda step: drafts, drafts
    sizes = {size, options.early_block_size or size}
    weight, compile = options.next_token_weight, options.compile
    by_size = {n: MaskedBlocks(options, n, mask, weight, compile) for n in sizes}
    early, late = by_size[options.early_block_size or size], by_size[size]
    early_steps = round(options.early_fraction * options.steps)
    evaluation = MaskedBlocks(options, size, mask)
    return lambda step: early if step < early_steps else late, evaluation


def accumulate_gradients(
    model: TwoTower,
    objective: Objective[InputsT],
    passes: Sequence[InputsT],
    precision: torch.autocast,
    device: str,
    processes: Processes,
) -> float:
    """Add the gradient of the loss over these passes of all processes; returns the loss.

    Every sum is divided by the tokens of the whole step, known before the first pass.
    """
    counts = processes.add(torch.stack([inputs.counts for inputs in passes]).sum(0))
    counts, weights = counts.clamp(min=1).to(device), torch.tensor(objective.weights).to(device)
    total = 0.0
    for inputs in passes:
        with precision:
            sums = objective.loss_sums(model, inputs.to(device))
            loss = (sums / counts * weights).sum()
        loss.backward()
        total += loss.item()
    return processes.add_number(total)


@dataclass(kw_only=True)
class Run:
    """One run: what it was asked for, the state that its steps change, where they are written.

    objective_at: what step number n learns. Another kind of training brings rows, a state and
    objectives of its own.
    """

    options: TrainOptions
    rows: Rows
    state: TrainState
    objective_at: Callable[[int], Objective[Any]]
    evaluation: Objective[Any]
    folder: RunFolder
    metrics: Metrics | None
    processes: Processes

    def __post_init__(self) -> None:
        self.device = self.processes.device or self.options.device
        self.balance = ExpertBalance(self.state.model, self.options.load_balance_rate)
        self.parameters = [p for p in self.state.model.parameters() if p.requires_grad]

    def steps(self) -> Iterator[StepReport]:
        """Step until the end, or until somebody stops the run."""
        options, state, processes = self.options, self.state, self.processes
        durations: deque[float] = deque(maxlen=_RECENT)
        saved_step = state.step
        with StopSignals(is_patient=processes.count > 1) as stop:
            while state.step < options.steps and not processes.any(stop.requested):
                begin = time.perf_counter()
                result = self._step()
                durations.append(time.perf_counter() - begin)
                report = self._record(*result, sum(durations) / len(durations))
                if self._is_due(options.checkpoint_every):
                    self._save()
                    saved_step = state.step
                yield report
        if saved_step != state.step:
            self._save()

    def _save(self) -> None:
        keep = self.options.keep_checkpoints
        self.folder.save(self.state, self.rows.fingerprint, keep, self.processes)

    def _step(self) -> tuple[float, float, float]:
        """Move the weights once; returns loss, gradient norm and learning rate."""
        options, state = self.options, self.state
        rate = learning_rate(state.step, options.steps, options.learning_rate, options)
        state.optimizer.set_learning_rate(rate)
        state.optimizer.zero_grad()
        self.balance.reset()
        objective = self.objective_at(state.step)
        passes = [self._draw(objective, number) for number in range(options.accumulate)]
        loss = accumulate_gradients(
            state.model, objective, passes, self._precision(), self.device, self.processes
        )
        norm = clip_gradients(self.parameters, options.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self.processes.error(self._not_finite(loss, norm))
        if loss == 0.0 and state.step == 0:
            raise self.processes.error(
                f"targets={options.targets}: no block of the first {options.batch_size} rows has "
                "a token to learn; use targets=all, or data prepared with align=block_size"
            )
        state.optimizer.step()
        for counts in self.balance.counts.values():
            counts.copy_(self.processes.add(counts.cpu()))
        self.balance.update()
        state.step += 1
        if state.average is not None:
            state.average.update(state.step)
        state.rows_read += options.batch_size * options.accumulate
        state.pending_losses.append(loss)
        return loss, norm, rate

    def _draw(self, objective: Objective[InputsT], number: int) -> InputsT:
        """This process's rows of one pass of the step."""
        size = self.options.batch_size
        own = self.processes.own_rows(self.state.rows_read + number * size, size)
        batch = self.rows.training(own.start, len(own))
        return objective.draw(batch, row_noise(self.options.seed, self.state.step, own))

    def _precision(self) -> torch.autocast:
        """bfloat16 for matrix products where the options ask for it; otherwise it does nothing."""
        kind, is_narrow = torch.device(self.device).type, self.options.dtype == "bfloat16"
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=is_narrow)

    def _not_finite(self, loss: float, norm: float) -> str:
        first, count = self.state.rows_read, self.options.batch_size * self.options.accumulate
        newest = self.folder.newest()
        kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return (
            f"loss: {loss} with gradient norm {norm} at step {self.state.step + 1}, rows {first} "
            f"to {first + count - 1} of the training order; stopped, {kept}: "
            "lower learning_rate or check the data and weights"
        )

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.options.steps

    def _record(self, loss: float, norm: float, rate: float, step_s: float) -> StepReport:
        """Write the metric lines that are due after this step, evaluating if it is time."""
        options, state, step = self.options, self.state, self.state.step
        tokens_per_s = options.tokens_per_step / step_s
        is_logged = self._is_due(options.log_every)
        if is_logged:
            values = {
                "loss": sum(state.pending_losses) / len(state.pending_losses),
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": state.rows_read * options.sequence_length,
                "tokens_per_s": round(tokens_per_s, 1),
            }
            if self.metrics is not None:
                self.metrics.write(step, values)
            state.pending_losses = []
        validation = None
        if options.eval_every and self._is_due(options.eval_every):
            validation = self._evaluate()
            if self.metrics is not None:
                self.metrics.write(step, {"validation_loss": validation})
        return StepReport(
            step=step,
            steps=options.steps,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_s=tokens_per_s,
            eta_s=(options.steps - step) * step_s,
            is_logged=is_logged,
            validation_loss=validation,
        )

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Loss over the first `eval_rows` held-out rows, with the same noise every time."""
        options, objective = self.options, self.evaluation
        count = min(options.eval_rows, self.rows.num_held_out)
        totals = torch.zeros(2, len(objective.weights), dtype=torch.float64)
        with self.state.averaged(), self._precision():
            for start in range(0, count, options.batch_size):
                own = self.processes.own_rows(start, min(options.batch_size, count - start))
                # All processes must compute, because each pass gathers weights from all.
                numbers = own or range(start, start + 1)
                batch = self.rows.held_out(numbers.start, len(numbers))
                inputs = objective.draw(batch, row_noise(options.seed, _EVALUATION, numbers))
                sums = objective.loss_sums(self.state.model, inputs.to(self.device))
                if own:
                    totals += torch.stack([sums.cpu().double(), inputs.counts.double()])
        sums, counts = self.processes.add(totals)
        return float((sums / counts.clamp(min=1) * torch.tensor(objective.weights)).sum())
