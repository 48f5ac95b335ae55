"""Block states for those who want to see blocks resolve."""

import time
from collections.abc import Sequence

from twotower.engine import StepTaken, Ticket, TokensCommitted
from twotower.tokenizer import Tokenizer


class Viewer:
    """What is told of the rows of one request."""

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
