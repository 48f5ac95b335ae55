"""The figures of /metrics, and a line of the log for each request.

Every figure is explained in docs/serving.md; a test compares.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from twotower.engine import Completion, Event, TokensCommitted, WorkerStats
from twotower.serve.answers import usage_of
from twotower.serve.errors import ApiError
from twotower.serve.requests import Generation

Family = CounterMetricFamily | GaugeMetricFamily
_LONGEST = 300  # characters of a value; a path may have 64 thousand
_BURST, _LINES_A_SECOND = 2_000, 200
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_PER_PASS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Of the worker's totals: metric, field, explanation.
_TOTALS = (
    ("rows_finished", "num_finished", "Rows that were decoded to their end"),
    ("rows_failed", "num_failed", "Rows that ended before it"),
    ("tokens", "tokens", "Tokens committed"),
    ("nfe", "nfe", "Denoiser passes, counted for each row that took part"),
    ("context_forwards", "context_forwards", "Context tower passes, counted likewise"),
    ("draft_tokens", "drafted_tokens", "Tokens drafted in mode speculative"),
    ("accepted_tokens", "accepted_tokens", "Draft tokens that verification accepted"),
    ("lookup_tokens", "lookup_tokens", "Those of them from lookups, in the text or in n-grams"),
    ("cache_hits", "cache_hits", "Prompts of which the prefix cache knew a part"),
    ("cache_misses", "cache_misses", "Prompts of which it knew nothing"),
    ("cache_saved_tokens", "cache_saved_tokens", "Prompt tokens not read again"),
    ("cache_evictions", "cache_evictions", "Entries that the prefix cache gave up"),
)
_LEVELS = (
    ("rows_waiting", "rows_waiting", "Rows that wait for a slot"),
    ("rows_in_flight", "rows_in_flight", "Rows that are being decoded"),
    ("cache_bytes", "cache_bytes", "Memory of the prefix cache"),
    ("worker_alive", "is_alive", "1 while the decoding thread runs"),
)


class Metrics:
    """Figures of one app in a registry of its own."""

    def __init__(self, stats: Callable[[], WorkerStats]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_WorkerCollector(stats))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        became = "HTTP requests by what became of them"
        self.requests = self._count("requests", became, "path", "status")
        self.refused = self._count("refused", "Requests refused, by reason", "reason")
        self.running = Gauge(
            "twotower_requests_in_flight", "HTTP requests being answered", registry=registry
        )
        self.restarts = self._count("worker_restarts", "Times that the decoding thread died")
        self.prompt_tokens = self._count("prompt_tokens", "Prompt tokens of answered requests")
        self.request_s = self._by_mode("request_seconds", "From body to the last byte", _SECONDS)
        self.first_block_s = self._by_mode(
            "time_to_first_block_seconds", "From body to a row's first commit", _SECONDS
        )
        self.token_s = self._by_mode(
            "time_per_token_seconds",
            "A row's time after its first commit, by the tokens that came in it",
            _TOKEN_SECONDS,
        )
        self.per_nfe = self._by_mode(
            "tokens_per_nfe", "A row's tokens by its denoiser passes", _PER_PASS
        )
        self.acceptance = self._by_mode(
            "acceptance", "Accepted share of a row's draft tokens", _SHARES
        )
        self.ends = self._count("row_ends", "How rows ended", "mode", "reason")

    def _count(self, name: str, explanation: str, *labels: str) -> Counter:
        return Counter(f"twotower_{name}", explanation, labels, registry=self.registry)

    def _by_mode(self, name: str, explanation: str, buckets: tuple[float, ...]) -> Histogram:
        name = f"twotower_{name}"
        return Histogram(name, explanation, ("mode",), buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    """The worker's own figures, asked for when somebody looks."""

    def __init__(self, stats: Callable[[], WorkerStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Family]:
        stats = self._stats()
        for name, field, explanation in _TOTALS:
            value = getattr(stats, field)
            yield CounterMetricFamily(f"twotower_{name}", explanation, value=value)
        for name, field, explanation in _LEVELS:
            value = float(getattr(stats, field))
            yield GaugeMetricFamily(f"twotower_{name}", explanation, value=value)


class Entry(dict[str, object]):
    """Fields of a request's line in the log, in the order in which they are set."""

    def line(self) -> str:
        """`name=value` pairs; text is quoted so that nobody can write a line of their own."""
        return " ".join(f"{name}={_quoted(value)}" for name, value in self.items())


def _quoted(value: object) -> str:
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    is_plain = text.isascii() and text.isprintable() and text and not set(' "=') & set(text)
    return text if is_plain else ascii(text)


class RateLimit(logging.Filter):
    """Lets so many lines pass and then so many a second, and says how many it has left out.

    Whoever can cause a line can cause any number: a full disk ends more than this server.
    """

    def __init__(self, burst: int = _BURST, lines_a_second: float = _LINES_A_SECOND) -> None:
        super().__init__()
        self._burst, self._rate = burst, lines_a_second
        self._left, self._last_s = float(burst), time.monotonic()
        self._num_dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._last_s) * self._rate)
        self._last_s = now
        if self._left < 1:
            self._num_dropped += 1
            return False
        self._left -= 1
        if self._num_dropped:
            record.msg = f"{record.getMessage()} ({self._num_dropped} lines before were left out)"
            record.args = ()
            self._num_dropped = 0
        return True


class Observed:
    """Watches the rows of one request."""

    def __init__(self, asked: Generation, metrics: Metrics, entry: Entry) -> None:
        self._asked = asked
        self._metrics = metrics
        self._entry = entry
        self._start_s = time.monotonic()
        self._first: dict[int, tuple[float, int]] = {}  # row: moment, tokens of its first commit
        self._last: dict[int, float] = {}
        self._drafts: dict[int, tuple[int, int]] = {}  # row: drafted, accepted
        entry["mode"] = asked.mode
        entry["rows"] = len(asked.requests)
        entry["prompt_tokens"] = sum(map(len, asked.prompts))

    def observe(self, index: int, event: Event) -> None:
        """Note the time of a commit."""
        if not isinstance(event, TokensCommitted):
            return
        now = self._last[index] = time.monotonic()
        if index not in self._first:
            self._first[index] = now, len(event.tokens)
            self._metrics.first_block_s.labels(self._asked.mode).observe(now - self._start_s)
            self._entry.setdefault("first_block_s", round(now - self._start_s, 4))
        if event.drafted is not None and event.accepted is not None:
            drafted, accepted = self._drafts.get(index, (0, 0))
            self._drafts[index] = drafted + event.drafted, accepted + event.accepted

    def finish(self, completions: Sequence[Completion]) -> None:
        """All rows are decoded."""
        metrics, mode = self._metrics, self._asked.mode
        usage = usage_of(self._asked, completions)
        for index, completion in enumerate(completions):
            self._measure(index, completion)
            metrics.ends.labels(mode, completion.finish_reason).inc()
        metrics.prompt_tokens.inc(sum(map(len, self._asked.prompts)))
        metrics.request_s.labels(mode).observe(time.monotonic() - self._start_s)
        for name in ("completion_tokens", "nfe", "context_forwards"):
            self._entry[name] = usage[name]
        self._entry["finish"] = ",".join(sorted({c.finish_reason for c in completions}))

    def _measure(self, index: int, completion: Completion) -> None:
        metrics, mode = self._metrics, self._asked.mode
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
        self._metrics.ends.labels(self._asked.mode, error.code).inc()
        self._entry["error"] = error.code
