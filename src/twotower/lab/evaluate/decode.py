"""Decode one group of prompts in one mode: texts, costs, and the trace of its blocks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.engine import Finished, GenerateOptions, StepTaken, stream
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

REPEATS, REPEATED_TOKENS, LONGEST_LOOP = 4, 16, 16


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one mode wrote after one prompt; `seconds` is its share of the group's time."""

    text: str
    tokens: int
    nfe: int
    context_forwards: int
    seconds: float
    degenerate: bool


@dataclass(kw_only=True)
class Trace:
    """How blocks were filled: passes of every block by its number, commit steps by position."""

    steps: list[tuple[int, int]] = field(default_factory=list)  # block number, passes
    commits: list[list[int]] = field(default_factory=list)  # per block: step of each position


def decode(
    model: TwoTower,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: GenerateOptions,
    trace: Trace,
) -> list[Output]:
    """Decode prompts together and time it as a whole, prompt reading included."""
    steps: list[StepTaken] = []
    finished: dict[int, Finished] = {}
    begin = time.perf_counter()
    for event in stream(model, prompts, options, tokenizer):
        if isinstance(event, StepTaken):
            steps.append(event)
        elif isinstance(event, Finished):
            finished[event.row] = event
    seconds = (time.perf_counter() - begin) / len(prompts)
    record_steps(steps, trace)
    outputs = []
    for row in range(len(prompts)):
        done = finished[row].completion
        outputs.append(
            Output(
                text=done.text or "",
                tokens=len(done.tokens),
                nfe=done.nfe,
                context_forwards=done.context_forwards,
                seconds=seconds,
                degenerate=done.finish_reason == "length" and is_loop(done.tokens),
            )
        )
    return outputs


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether a text ends in one sequence of up to 16 tokens, at least four times in a row.

    Sequences of one to three tokens must fill 16 tokens: "000" is a number, not a loop.
    """
    for length in range(1, LONGEST_LOOP + 1):
        count = max(REPEATS, -(-REPEATED_TOKENS // length))
        tail = tokens[-length * count :]
        if len(tail) == length * count and all(
            tail[i] == tail[i + length] for i in range(len(tail) - length)
        ):
            return True
    return False


def record_steps(steps: Sequence[StepTaken], trace: Trace) -> None:
    """Add to the trace what the steps of a group show: `StepTaken.is_masked` after each step."""
    blocks: dict[tuple[int, int], list[StepTaken]] = {}
    for step in steps:
        blocks.setdefault((step.row, step.block_index), []).append(step)
    for (_, number), taken in blocks.items():
        trace.steps.append((number, len(taken)))
        first_open = [
            sum(step.is_masked[position] for step in taken) + 1
            for position in range(len(taken[0].is_masked))
        ]
        trace.commits.append(first_open)
