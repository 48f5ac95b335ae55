"""States of runs that are small enough for tests, moved once by each of their parts."""

import torch

from twotower.model.initialise import randomise
from twotower.model.two_tower import TwoTower
from twotower.train.optimizer import WeightAverage, make_optimizer
from twotower.train.options import TrainOptions
from twotower.train.presets import preset_config
from twotower.train.state import TrainState


def make_state(seed: int = 0, step: int = 0, optimizer: str = "muon") -> TrainState:
    """Of a backbone; with `step`, after a step."""
    model = TwoTower(preset_config("tiny", 64), "context")
    randomise(model, seed)
    options = TrainOptions(recipe="backbone", optimizer=optimizer)  # type: ignore[arg-type]
    average = WeightAverage(model, 0.5)
    state = TrainState(model=model, optimizer=make_optimizer(model, options), average=average)
    if step:
        model.context_logits(torch.randint(0, 64, (2, 8))).square().mean().backward()
        state.optimizer.set_learning_rate(0.01)
        state.optimizer.step()
        average.update(step)
        state.step, state.rows_read, state.pending_losses = step, 4 * step, [0.1, step / 3]
    return state
