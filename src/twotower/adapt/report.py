"""What a denoiser is worth on prompts that it never saw: acceptance and time, task by task."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from twotower.adapt.answers import Question
from twotower.engine import Completion, GenerateOptions, generate
from twotower.model import TwoTower

_WARM_UP = 4  # tokens


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt in mode ar and in mode speculative."""

    task: str
    is_equal: bool
    tokens: int
    cycles: int
    ar_s: float
    speculative_s: float


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Sums over a task's prompts."""

    task: str
    prompts: int
    equal: int
    tokens_per_cycle: float
    speedup: float
    """Time of mode ar divided by that of mode speculative, prompts included."""


def compare(
    backbone: TwoTower,
    model: TwoTower,
    questions: Sequence[Question],
    max_new_tokens: int,
) -> Iterator[Pair]:
    """Both modes on one prompt after another; who begins alternates. What is done once on a machine
    or in a process is not counted, nor, on a CPU, the time that other programs have the core.
    """
    clock = time.thread_time if backbone.context_device.type == "cpu" else time.perf_counter
    plain = GenerateOptions(mode="ar", max_new_tokens=max_new_tokens)
    drafted = replace(plain, mode="speculative")
    if questions:
        few = replace(drafted, max_new_tokens=min(max_new_tokens, _WARM_UP))
        for runner in (backbone, model):
            generate(runner, [questions[0].prompt], few)
        model.pass_costs  # noqa: B018  # which no draft may have asked for yet
    for number, question in enumerate(questions):
        runs = [(backbone, plain), (model, drafted)]
        found: dict[str, tuple[Completion, float]] = {}
        for runner, options in runs if number % 2 else reversed(runs):
            began = clock()
            (completion,) = generate(runner, [question.prompt], options)
            found[str(options.mode)] = completion, clock() - began
        (ar, ar_s), (speculative, speculative_s) = found["ar"], found["speculative"]
        yield Pair(
            task=question.task,
            is_equal=ar.tokens == speculative.tokens,
            tokens=len(speculative.tokens),
            cycles=speculative.context_forwards,
            ar_s=ar_s,
            speculative_s=speculative_s,
        )


def by_task(pairs: Sequence[Pair]) -> list[TaskResult]:
    """Each task's sums, and those of all at the end."""
    tasks = list(dict.fromkeys(pair.task for pair in pairs))
    groups = [(task, [pair for pair in pairs if pair.task == task]) for task in tasks]
    if len(groups) > 1:
        groups.append(("all", list(pairs)))
    return [
        TaskResult(
            task=task,
            prompts=len(own),
            equal=sum(pair.is_equal for pair in own),
            tokens_per_cycle=sum(p.tokens for p in own) / max(1, sum(p.cycles for p in own)),
            speedup=sum(p.ar_s for p in own) / sum(p.speculative_s for p in own),
        )
        for task, own in groups
    ]
