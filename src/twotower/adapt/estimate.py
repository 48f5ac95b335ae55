"""What a budget gives, said before it is spent: passes are timed, acceptance is off a curve."""

import json
import math
import time
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from twotower.adapt.answers import Question
from twotower.adapt.budget import Budget
from twotower.adapt.features import Features, Place, Rows
from twotower.adapt.options import AnswerOptions, StepOptions, ThinOptions
from twotower.adapt.training import Trainer
from twotower.layers.attention import KV
from twotower.model import TwoTower
from twotower.model.rows import select_rows

_TIMED, _TIMED_S = 3, 1.0  # passes of each kind at least, and seconds
_USUAL = 0.5  # of the greatest length of an answer, what most have
_STEPS = 0.9  # of the time of training; in the rest it is measured


class _Sample(Features):
    """`count` answers of any tokens after prompts of some length."""

    def __init__(self, model: TwoTower, count: int, prompt: int, length: int) -> None:
        reads, length = model.config.reads, prompt + length
        super().__init__(reads)
        width, layers = model.config.hidden_size, model.empty_cache(count).layers
        states = {}
        for read in reads:
            state = layers[read]
            if isinstance(state, KV):
                shape = (count, length, *state.k.shape[2:])
                states[read] = KV(torch.zeros(shape), torch.zeros(shape))
        self._rows = Rows(
            tokens=torch.zeros(count, length, dtype=torch.int64),
            hidden=torch.zeros(count, length, width),
            states=states,
            lengths=torch.full((count,), length),
            starts=torch.full((count,), prompt),
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
    questions: Sequence[Question],
) -> str:
    """One line; takes a few seconds. drafting: the backbone with the denoiser that training begins
    with.
    """
    prompt = round(fmean(len(question.prompt) for question in questions))
    length = max(1, round(_USUAL * answers.max_new_tokens))
    rows = min(answers.batch_size, len(questions))
    answers_s, every = budget.seconds("answers"), len(questions) * length
    token_s = _answer_token_s(model, rows, prompt, length)
    # The end of the time finds answers half written, of which few are kept.
    tokens = max(0.0, min(every, answers_s / token_s - rows * length / 2))
    answers_s = min(answers_s, every * token_s)
    train_s = budget.seconds("train") + budget.seconds("answers") - answers_s
    sample = _Sample(drafting, steps.answers_per_step, prompt, length)
    blocks = steps.blocks * _STEPS * train_s / _training_step_s(drafting, sample, steps)
    said = (
        f"{budget.minutes:g} minutes give about {_short(tokens)} tokens of answers "
        f"({tokens / max(answers_s, 1e-9):.0f} a second) and {_short(blocks)} blocks of training"
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
def _answer_token_s(model: TwoTower, rows: int, prompt: int, length: int) -> float:
    """Seconds of a token of answers of one mean length, its share of the prompt included: some rows
    are written together, of which long answers are more often written than short ones.
    """
    ids = torch.zeros(1, prompt + 2 * length // 3, dtype=torch.int64)
    read_s = _mean_s(lambda: model.prefill(ids)) / ids.shape[1]
    cache = select_rows(model.prefill(ids), torch.zeros(rows, dtype=torch.int64))

    def write() -> None:
        hidden: Tensor = model.extend(cache, torch.zeros(rows, 1, dtype=torch.int64))
        model.context_head(hidden).argmax(-1)

    return _mean_s(write) / rows + prompt * read_s / length


def _training_step_s(model: TwoTower, sample: Features, steps: StepOptions) -> float:
    """Seconds of a step of training."""
    places = [Place(file=Path(), first=0, last=1, start=0)]
    trainer = Trainer(model, sample, steps)
    return _mean_s(lambda: trainer.take_step(places, 0.0))


def _mean_s(run: Callable[[], object]) -> float:
    """Seconds of a run, after one that warms up: the mean of a second or more, with whatever else
    runs on the machine.
    """
    run()
    began, count = time.perf_counter(), 0
    while count < _TIMED or time.perf_counter() - began < _TIMED_S:
        run()
        count += 1
    return (time.perf_counter() - began) / count


def _short(count: float) -> str:
    for unit, name in ((1e6, "million"), (1e3, "thousand")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f}"
