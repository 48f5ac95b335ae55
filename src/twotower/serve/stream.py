"""Engine events into the lines of a stream: text when a block is committed, then `[DONE]`."""

import json
import time
from collections.abc import AsyncGenerator, Sequence

from twotower.engine import Completion, StepTaken, Ticket, TokensCommitted
from twotower.serve.errors import ApiError
from twotower.serve.job import Job
from twotower.serve.observe import Observed
from twotower.serve.rows import finished, merged
from twotower.serve.shapes import Shape
from twotower.serve.usage import usage_of
from twotower.tokenizer import Tokenizer

DONE = "[DONE]"


async def stream_lines(
    job: Job, tickets: Sequence[Ticket], shape: Shape, viewer: "Viewer | None", observed: Observed
) -> AsyncGenerator[dict[str, object], None]:
    """Chunks of an answer as JSON-able records; after an error of a row, it is the last record."""
    completions: dict[int, Completion] = {}
    for index in range(len(tickets)):
        if (chunk := shape.begin(index)) is not None:
            yield chunk
    events = merged(tickets)
    try:
        async for index, event in events:
            observed.hear(index, event)
            if viewer is not None and (record := viewer.record(index, event)) is not None:
                yield record
            if isinstance(event, TokensCommitted) and (event.text or event.logprobs):
                chunk = shape.text(index, event.text, event.logprobs)
                if chunk is not None:
                    yield chunk
            if (completion := finished(event)) is not None:
                completions[index] = completion
                yield shape.end(index, completion)
    except ApiError as error:
        observed.fail(error)
        yield error.body()
        return
    finally:
        await events.aclose()
    observed.finish([completions[index] for index in range(len(tickets))])
    yield shape.usage(usage_of(job, [completions[index] for index in range(len(tickets))]))


class Viewer:
    """Block states for those who want to see blocks resolve."""

    def __init__(self, tokenizer: Tokenizer, tickets: Sequence[Ticket]) -> None:
        self._tokenizer = tokenizer
        self._tickets = tickets

    def record(self, index: int, event: object) -> dict[str, object] | None:
        """The record of a step or of a commit; None for other events."""
        match event:
            case StepTaken():
                return self._step(index, event)
            case TokensCommitted():
                return self._commit(index, event)
            case _:
                return None

    def _step(self, index: int, event: StepTaken) -> dict[str, object]:
        tokens = [
            {
                "id": None if is_masked else token,
                "text": "" if is_masked else self._tokenizer.token_text(token),
                "masked": is_masked,
                "confidence": round(confidence, 4),
            }
            for token, is_masked, confidence in zip(
                event.tokens, event.is_masked, event.confidence, strict=True
            )
        ]
        return {
            "object": "twotower.step",
            "index": index,
            "block": event.block_index,
            "step": event.step,
            "t": event.t,
            "nfe": event.nfe,
            "tokens": tokens,
            "elapsed_ms": self._elapsed_ms(index),
        }

    def _commit(self, index: int, event: TokensCommitted) -> dict[str, object]:
        return {
            "object": "twotower.commit",
            "index": index,
            "block": event.block_index,
            "tokens": [
                {"id": token, "text": self._tokenizer.token_text(token)} for token in event.tokens
            ],
            "drafted": event.drafted,
            "accepted": event.accepted,
            "rejected": event.rejected,
            "nfe": event.nfe,
            "context_forwards": event.context_forwards,
            "elapsed_ms": self._elapsed_ms(index),
        }

    def _elapsed_ms(self, index: int) -> float:
        row = self._tickets[index].row
        start_s = row.submitted_s if row.started_s is None else row.started_s
        return round((time.monotonic() - start_s) * 1000, 1)


def to_data(record: object) -> str:
    """One record as the data of a server-sent event."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))
