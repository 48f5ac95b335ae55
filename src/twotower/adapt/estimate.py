"""What a budget gives, said before it is spent: passes are timed, acceptance is off a curve."""

import json
import math
import time
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from twotower.adapt.budget import Budget
from twotower.adapt.features import Features, Place, Rows
from twotower.adapt.options import AnswerOptions, StepOptions, ThinOptions
from twotower.adapt.training import Trainer
from twotower.layers.attention import KV
from twotower.model import TwoTower
from twotower.model.rows import select_rows

_TIMED = 3  # passes of each kind, after one that warms up
_TOKENS = 200  # of a text that is trained on


class _Sample(Features):
    """Answers of any tokens, as long as usual ones."""

    def __init__(self, model: TwoTower, reads: Sequence[int], count: int) -> None:
        super().__init__(reads)
        width, layers = model.config.hidden_size, model.empty_cache(count).layers
        states = {}
        for read in reads:
            state = layers[read]
            if isinstance(state, KV):
                shape = (count, _TOKENS, *state.k.shape[2:])
                states[read] = KV(torch.zeros(shape), torch.zeros(shape))
        self._rows = Rows(
            tokens=torch.zeros(count, _TOKENS, dtype=torch.int64),
            hidden=torch.zeros(count, _TOKENS, width),
            states=states,
            lengths=torch.full((count,), _TOKENS),
            starts=torch.full((count,), _TOKENS // 4),
        )

    def rows(self, places: object, dtype: torch.dtype = torch.float32) -> Rows:
        return self._rows


def estimate(
    model: TwoTower,
    drafting: TwoTower,
    thin: ThinOptions,
    answers: AnswerOptions,
    steps: StepOptions,
    budget: Budget,
    prompt: int,
) -> str:
    """One line; takes a few seconds. drafting: the backbone with the denoiser that training begins
    with; prompt: tokens of a usual one.
    """
    rate = 1 / _answer_token_s(model, answers, prompt)
    tokens = rate * budget.seconds("answers")
    blocks = steps.blocks * budget.seconds("train") / _training_step_s(drafting, steps)
    said = (
        f"{budget.minutes:g} minutes give at most {_short(tokens)} tokens of answers ({rate:.0f} a "
        f"second) and {_short(blocks)} blocks of training"
    )
    if thin.denoiser is not None:  # how far that one is, the curve of a new one does not tell
        return said
    name, expected = expected_tokens_per_cycle(blocks)
    return f"{said}; {name} had {expected:.1f} tokens a cycle after as many blocks"


def expected_tokens_per_cycle(blocks: float) -> tuple[str, float]:
    """The model of the recorded curve, and what it had after so many blocks, between its points by
    the logarithm.
    """
    file = resources.files("twotower") / "adapt" / "curve.json"
    known = json.loads(file.read_text())
    points = [(1.0, 1.0), *known["points"]]
    for (before, low), (after, high) in pairwise(points):
        if blocks <= after:
            share = math.log(max(1.0, blocks) / before) / math.log(after / before)
            return str(known["model"]), low + share * (high - low)
    return str(known["model"]), points[-1][1]


@torch.no_grad()
def _answer_token_s(model: TwoTower, answers: AnswerOptions, prompt: int) -> float:
    """Seconds of a token of an answer of the greatest length, its share of the prompt included:
    some rows are written together, behind texts that are half written on average.
    """
    ids = torch.zeros(1, prompt + answers.max_new_tokens // 2, dtype=torch.int64)
    read_s = _fastest_s(lambda: model.prefill(ids)) / ids.shape[1]
    rows = answers.batch_size
    cache = select_rows(model.prefill(ids), torch.zeros(rows, dtype=torch.int64))

    def write() -> None:
        hidden: Tensor = model.extend(cache, torch.zeros(rows, 1, dtype=torch.int64))
        model.context_head(hidden).argmax(-1)

    return _fastest_s(write) / rows + prompt * read_s / answers.max_new_tokens


def _training_step_s(model: TwoTower, steps: StepOptions) -> float:
    """Seconds of a step of training."""
    sample = _Sample(model, model.config.reads, steps.answers_per_step)
    places = [Place(file=Path(), first=0, last=_TOKENS, start=0)]
    trainer = Trainer(model, sample, steps)
    return _fastest_s(lambda: trainer.take_step(places, 0.0))


def _fastest_s(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    times = []
    for _ in range(_TIMED + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _short(count: float) -> str:
    for unit, name in ((1e6, "million"), (1e3, "thousand")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f}"
