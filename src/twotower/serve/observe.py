"""What one request tells metrics and log while it is answered."""

import time
from collections.abc import Sequence

from twotower.engine import Completion, Event, TokensCommitted
from twotower.serve.errors import ApiError
from twotower.serve.job import Job
from twotower.serve.metrics import Metrics
from twotower.serve.usage import usage_of


class Entry(dict[str, object]):
    """Fields of a request's line in the log, in the order in which they are set."""

    def line(self) -> str:
        """`name=value` pairs; text is quoted so that nobody can write a line of their own."""
        return " ".join(f"{name}={_quoted(value)}" for name, value in self.items())


def _quoted(value: object) -> str:
    text = str(value)
    is_plain = text.isascii() and text.isprintable() and text and not set(' "=') & set(text)
    return text if is_plain else ascii(text)


class Observed:
    """Watches the rows of one request."""

    def __init__(self, job: Job, metrics: Metrics, entry: Entry) -> None:
        self._job = job
        self._metrics = metrics
        self._entry = entry
        self._start_s = time.monotonic()
        self._first: dict[int, tuple[float, int]] = {}  # row: moment, tokens of its first commit
        self._last: dict[int, float] = {}
        self._drafts: dict[int, tuple[int, int]] = {}  # row: drafted, accepted
        entry["mode"] = job.mode
        entry["rows"] = len(job.requests)
        entry["prompt_tokens"] = sum(map(len, job.prompts))

    def hear(self, index: int, event: Event) -> None:
        """Take the time of a commit."""
        if not isinstance(event, TokensCommitted):
            return
        now = self._last[index] = time.monotonic()
        if index not in self._first:
            self._first[index] = now, len(event.tokens)
            self._metrics.first_block_s.labels(self._job.mode).observe(now - self._start_s)
            self._entry.setdefault("first_block_s", round(now - self._start_s, 4))
        if event.drafted is not None and event.accepted is not None:
            drafted, accepted = self._drafts.get(index, (0, 0))
            self._drafts[index] = drafted + event.drafted, accepted + event.accepted

    def finish(self, completions: Sequence[Completion]) -> None:
        """All rows are decoded."""
        metrics, mode = self._metrics, self._job.mode
        usage = usage_of(self._job, completions)
        for index, completion in enumerate(completions):
            self._measure(index, completion)
            metrics.ends.labels(mode, completion.finish_reason).inc()
        metrics.prompt_tokens.inc(sum(map(len, self._job.prompts)))
        metrics.request_s.labels(mode).observe(time.monotonic() - self._start_s)
        for name in ("completion_tokens", "nfe", "context_forwards"):
            self._entry[name] = usage[name]
        self._entry["finish"] = ",".join(sorted({c.finish_reason for c in completions}))

    def _measure(self, index: int, completion: Completion) -> None:
        metrics, mode = self._metrics, self._job.mode
        moment, num_first = self._first[index]
        later = len(completion.tokens) - num_first
        if later > 0:
            metrics.token_s.labels(mode).observe((self._last[index] - moment) / later)
        if completion.nfe:
            metrics.per_nfe.labels(mode).observe(len(completion.tokens) / completion.nfe)
        drafted, accepted = self._drafts.get(index, (0, 0))
        if drafted:
            metrics.acceptance.labels(mode).observe(accepted / drafted)

    def fail(self, error: ApiError) -> None:
        """The request ends with an error."""
        self._metrics.ends.labels(self._job.mode, error.code).inc()
        self._entry["error"] = error.code
