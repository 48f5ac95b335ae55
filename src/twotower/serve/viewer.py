"""Block states for those who want to see blocks resolve."""

import time
from collections.abc import Sequence

from twotower.engine import StepTaken, Ticket, TokensCommitted
from twotower.serve.requests import Served


class Viewer:
    """What is told of the rows of one request."""

    def __init__(self, served: Served, tickets: Sequence[Ticket]) -> None:
        self._tokenizer, self._notice = served.tokenizer, served.notice
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
        options = self._tickets[index].row.options
        is_given = options.mode == "diffusion" and options.first_token == "context"
        tokens = [
            {
                "id": None if is_masked else token,
                "text": "" if is_masked else self._tokenizer.token_text(token),
                "masked": is_masked,
                # None: the context tower's own, of which the denoiser was not asked.
                "confidence": None if is_given and not place else round(confidence, 4),
            }
            for place, (token, is_masked, confidence) in enumerate(
                zip(event.tokens, event.is_masked, event.confidence, strict=True)
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
            "notice": self._notice_of(index) if event.block_index == 0 else None,
            "drafted": event.drafted,
            "accepted": event.accepted,
            "drafter": event.drafter,
            "rejected": event.rejected,
            "nfe": event.nfe,
            "context_forwards": event.context_forwards,
            "elapsed_ms": self._elapsed_ms(index),
        }

    def _notice_of(self, index: int) -> str | None:
        return None if self._notice is None else self._notice(self._tickets[index].row.prompt)

    def _elapsed_ms(self, index: int) -> float:
        row = self._tickets[index].row
        start_s = row.submitted_s if row.started_s is None else row.started_s
        return round((time.monotonic() - start_s) * 1000, 1)
