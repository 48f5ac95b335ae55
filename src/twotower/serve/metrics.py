"""The figures of /metrics. Every one is explained in docs/serving.md; a test compares."""

from collections.abc import Callable, Iterator

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

from twotower.engine import WorkerStats

Family = CounterMetricFamily | GaugeMetricFamily
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
    ("cache_hits", "cache_hits", "Prompts of which the prefix cache knew a part"),
    ("cache_misses", "cache_misses", "Prompts of which it knew nothing"),
    ("cache_saved_tokens", "cache_saved_tokens", "Prompt tokens not read again"),
    ("cache_evictions", "cache_evictions", "Entries that the prefix cache gave up"),
)
_LEVELS = (
    ("rows_waiting", "rows_waiting", "Rows that wait for a place"),
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
        self.requests = Counter(
            "twotower_requests",
            "HTTP requests by what became of them",
            ("path", "status"),
            registry=registry,
        )
        self.refused = Counter(
            "twotower_refused", "Requests refused, by reason", ("reason",), registry=registry
        )
        self.running = Gauge(
            "twotower_requests_in_flight", "HTTP requests being answered", registry=registry
        )
        self.restarts = Counter(
            "twotower_worker_restarts", "Times that the decoding thread died", registry=registry
        )
        self.prompt_tokens = Counter(
            "twotower_prompt_tokens", "Prompt tokens of answered requests", registry=registry
        )
        self.request_s = self._by_mode(
            "twotower_request_seconds", "From body to the last byte", _SECONDS
        )
        self.first_block_s = self._by_mode(
            "twotower_time_to_first_block_seconds", "From body to a row's first commit", _SECONDS
        )
        self.token_s = self._by_mode(
            "twotower_time_per_token_seconds",
            "A row's time after its first commit, by the tokens that came in it",
            _TOKEN_SECONDS,
        )
        self.per_nfe = self._by_mode(
            "twotower_tokens_per_nfe", "A row's tokens by its denoiser passes", _PER_PASS
        )
        self.acceptance = self._by_mode(
            "twotower_acceptance", "Accepted share of a row's draft tokens", _SHARES
        )
        self.ends = Counter(
            "twotower_row_ends",
            "How rows ended",
            ("mode", "reason"),
            registry=registry,
        )

    def _by_mode(self, name: str, explanation: str, buckets: tuple[float, ...]) -> Histogram:
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
