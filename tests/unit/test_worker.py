"""The worker's promises one by one: bounds, ends, hand-over, counts, idleness."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from property.test_scheduler import watched
from tiny_models import fresh_model, prompts_of, tiny_model
from tiny_worker import MODEL, completion_of, end_of, failure_of, options, running, wait_for
from twotower import ContextCache, GenerateOptions, TwoTower, generate, memory
from twotower.engine import (
    EngineOptions,
    Failed,
    Finished,
    QueueFull,
    Request,
    StepTaken,
    Stopped,
    Ticket,
    TokensCommitted,
    Worker,
    stream_requests,
)
from twotower.engine.prefix_cache import PrefixCache
from twotower.engine.resolved import Mode

PROMPTS = prompts_of([5, 3, 9, 2])
LONG = Request(PROMPTS[0], options(mode="ar", max_new_tokens=100_000))
SHORT = Request(PROMPTS[1], options(mode="ar", max_new_tokens=2))
with_and_without_overlap = pytest.mark.parametrize("overlap", ["off", "on"])


@contextlib.contextmanager
def one_at_a_time(**changes: object) -> Iterator[tuple[Worker, Ticket]]:
    """A worker with one slot, which a row of no end has."""
    with running(batch_size=1, **changes) as worker:
        ticket = worker.submit(LONG)
        wait_for(lambda: worker.stats().tokens > 0)
        yield worker, ticket


def test_events_are_those_of_a_stream() -> None:
    with running() as worker:
        plain = list(worker.submit(Request(PROMPTS[0], options())).events())
        ticket = worker.submit(Request(PROMPTS[0], options()), wants_steps=True)
        detailed = list(ticket.events())
    expected = generate(MODEL, PROMPTS[:1], options())[0]
    assert [type(event) for event in plain] == [TokensCommitted, TokensCommitted, Finished]
    assert isinstance(plain[-1], Finished) and plain[-1].completion == expected
    steps = [event for event in detailed if isinstance(event, StepTaken)]
    assert len(steps) == expected.nfe and {event.row for event in detailed} == {ticket.row.index}


@with_and_without_overlap
def test_a_cancelled_row_leaves_before_the_next_cycle(
    monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Guards the machine's time: passes for a client that has gone, memory of its cache."""
    tickets: list[Ticket] = []
    rows: list[int] = []
    method = TwoTower.verify

    def spy(model: TwoTower, cache: ContextCache, *rest: Any) -> object:
        rows.extend(int(length) for length in cache.lengths if length >= 9)
        if len(rows) == 3:
            tickets[0].cancel()
        return method(model, cache, *rest)

    monkeypatch.setattr(TwoTower, "verify", spy)
    with running(overlap=overlap) as worker:
        request = Request(PROMPTS[2], options(mode="ar", max_new_tokens=1000))
        tickets.append(worker.submit(request))
        events = list(tickets[0].events())
        assert isinstance(events[-1], Failed) and events[-1].kind == "cancelled"
        assert events[-1].message == "the request was cancelled"
        completion_of(worker.submit(SHORT))
    assert rows == [9, 10, 11] and len(events) == 5


@with_and_without_overlap
@pytest.mark.parametrize("mode", ["diffusion", "speculative"])
def test_a_block_that_nobody_waits_for_is_not_filled(
    monkeypatch: pytest.MonkeyPatch, mode: Mode, overlap: str
) -> None:
    """Guards deadlines and everybody behind: a block may have hundreds of passes."""
    tickets: list[Ticket] = []
    num_passes = 0
    method = TwoTower.denoise

    def spy(model: TwoTower, *given: object) -> object:
        nonlocal num_passes
        num_passes += 1
        if num_passes == 3:
            for ticket in tickets:
                ticket.cancel()
        return method(model, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(TwoTower, "denoise", spy)
    slow = GenerateOptions(
        mode=mode,
        block_size=32,
        max_new_tokens=32,
        confidence_threshold=1.0,
        steps_per_block=200 if mode == "diffusion" else None,
        draft_passes=200 if mode == "speculative" else None,
        drafts="denoiser" if mode == "speculative" else None,
    )
    with running(overlap=overlap) as worker:
        tickets += [worker.submit(Request(prompt, slow)) for prompt in PROMPTS[:2]]
        assert [failure_of(ticket).kind for ticket in tickets] == ["cancelled"] * 2
        assert completion_of(worker.submit(SHORT)).tokens
    assert num_passes <= 4, "the pass in which they left, and one of the other row"


def test_a_row_that_waits_is_cancelled_while_it_waits() -> None:
    with one_at_a_time() as (worker, _):
        waiting = worker.submit(SHORT)
        waiting.cancel()
        assert failure_of(waiting).kind == "cancelled"
        assert worker.stats().rows_waiting == 0


def test_who_leaves_its_events_has_cancelled() -> None:
    with one_at_a_time() as (worker, ticket):
        for _ in ticket.events():
            break
        assert completion_of(worker.submit(SHORT)).tokens


@with_and_without_overlap
def test_a_deadline_ends_rows_that_run_and_rows_that_wait(overlap: str) -> None:
    with running(batch_size=1, overlap=overlap) as worker:
        start = time.monotonic()
        tickets = [worker.submit(LONG, deadline_s=0.3), worker.submit(SHORT, deadline_s=0.1)]
        ends = [failure_of(ticket) for ticket in tickets]
        assert [end.kind for end in ends] == ["deadline", "deadline"]
        assert 0.3 <= time.monotonic() - start < 30
        assert completion_of(worker.submit(SHORT, deadline_s=1000)).tokens


def test_a_full_line_refuses() -> None:
    with one_at_a_time(max_waiting=2) as (worker, ticket):
        waiting = [worker.submit(SHORT), worker.submit(SHORT)]
        with pytest.raises(QueueFull, match="2 requests wait already; try again in") as caught:
            worker.submit(SHORT)
        assert 1 <= caught.value.retry_after_s <= 60
        assert worker.stats().rows_waiting == 2 and worker.stats().rows_in_flight == 1
        ticket.cancel()
        for one in waiting:
            completion_of(one)
        completion_of(worker.submit(SHORT))


def test_an_unusable_request_is_refused_at_once() -> None:
    with running() as worker:
        with pytest.raises(ValueError, match="the prompt is empty; give at least one token"):
            worker.submit(Request([], options()))
        assert worker.stats().rows_waiting == worker.stats().rows_in_flight == 0


def test_a_row_that_never_fits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 10**6)
    with running() as worker:
        end = failure_of(worker.submit(Request(prompts_of([20000])[0], options())))
        assert end.kind == "memory" and "a prompt of 20000 tokens in 1 rows needs" in end.message
        assert completion_of(worker.submit(SHORT)).tokens


def test_memory_that_runs_out_in_a_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(model: TwoTower, cache: ContextCache) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(TwoTower, "next_logits", scarce)
    with running() as worker:
        end = failure_of(worker.submit(SHORT))
    assert end.kind == "memory" and end.message.startswith("there was not enough memory for this")


@with_and_without_overlap
def test_a_stop_finishes_rows(overlap: str) -> None:
    """Guards answers that are all but ready, also of those that have not begun."""
    worker = Worker(MODEL, None, EngineOptions(batch_size=1, overlap=overlap))  # type: ignore[arg-type]
    worker.start()
    tickets = [worker.submit(SHORT) for _ in range(3)]
    worker.stop(grace_s=100)
    assert not worker.stats().is_alive
    assert all(completion_of(ticket).tokens for ticket in tickets)
    with pytest.raises(Stopped):
        worker.submit(SHORT)


@with_and_without_overlap
def test_a_stop_tells_those_it_cannot_finish(overlap: str) -> None:
    """Guards clients that would wait for ever."""
    with one_at_a_time(overlap=overlap) as (worker, ticket):
        waiting = worker.submit(SHORT)
        start = time.monotonic()
        worker.stop(grace_s=0.2)
        assert time.monotonic() - start >= 0.2
        assert [failure_of(one).kind for one in (ticket, waiting)] == ["stopped", "stopped"]


def test_a_worker_that_never_started_tells_too() -> None:
    worker = Worker(MODEL)
    ticket = worker.submit(SHORT)
    worker.stop(grace_s=100)
    assert failure_of(ticket).kind == "stopped"


def test_events_reach_an_event_loop() -> None:
    """Guards the server's loop: it must go on while rows are decoded, and miss no event."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def read(worker: Worker) -> list[list[str]]:
        async def one(ticket: Ticket) -> list[str]:
            return [type(event).__name__ async for event in ticket.aevents()]

        ticking = asyncio.create_task(tick())
        tickets = [worker.submit(Request(prompt, options())) for prompt in PROMPTS]
        found = await asyncio.gather(*map(one, tickets))
        ticking.cancel()
        return found

    with running(batch_size=2) as worker:
        found = asyncio.run(asyncio.wait_for(read(worker), 60))
    assert found == [["TokensCommitted", "TokensCommitted", "Finished"]] * 4
    assert ticks > 20


def test_leaving_an_asynchronous_iterator_cancels() -> None:
    async def leave(ticket: Ticket) -> None:
        events = ticket.aevents()
        await anext(events)
        await events.aclose()

    with one_at_a_time() as (worker, ticket):
        asyncio.run(leave(ticket))
        assert completion_of(worker.submit(SHORT)).tokens


def test_a_closed_event_loop_does_no_harm() -> None:
    """Guards the thread: a client's loop may end while its row is decoded."""

    async def begin(ticket: Ticket) -> None:
        events = ticket.aevents()
        await anext(events)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)

    with one_at_a_time() as (worker, ticket):
        asyncio.run(begin(ticket))
        ticket.cancel()
        assert completion_of(worker.submit(SHORT)).tokens


def test_totals_are_those_of_the_rows() -> None:
    modes = ["ar", "diffusion", "speculative", "mock-ar"]
    o = [options(mode=mode, max_new_tokens=12) for mode in modes]
    expected = [generate(MODEL, [p], own)[0] for p, own in zip(PROMPTS, o, strict=True)]
    with running() as worker:
        tickets = [worker.submit(Request(p, own)) for p, own in zip(PROMPTS, o, strict=True)]
        events = [list(ticket.events()) for ticket in tickets]
        stats = worker.stats()
    assert stats.tokens == sum(len(row.tokens) for row in expected) == 48
    assert stats.nfe == sum(row.nfe for row in expected)
    assert stats.context_forwards == sum(row.context_forwards for row in expected)
    assert (stats.num_finished, stats.num_failed, stats.rows_in_flight) == (4, 0, 0)
    commits = [e for e in events[2] if isinstance(e, TokensCommitted)]
    assert stats.drafted_tokens == sum(e.drafted or 0 for e in commits) > 0
    assert stats.accepted_tokens == sum(e.accepted or 0 for e in commits)
    for commit in commits[1:-1]:
        assert len(commit.tokens) == (commit.accepted or 0) + 1
        assert 0 <= (commit.accepted or 0) <= (commit.drafted or 0) <= 3
    assert all(e.drafted is None for e in events[0] if isinstance(e, TokensCommitted))


def test_totals_tell_lookup_from_the_denoiser() -> None:
    """Guards the record of who drafted what was accepted."""
    model = tiny_model(vocab_size=6)  # its texts repeat themselves
    own = options(mode="speculative", max_new_tokens=40)
    worker = Worker(model)
    worker.start()
    done = completion_of(worker.submit(Request([4, 5], own)))
    worker.stop()
    stats = worker.stats()
    assert stats.lookup_tokens == done.lookup_tokens > 0
    assert stats.accepted_tokens == done.lookup_tokens + done.denoiser_tokens


@with_and_without_overlap
def test_an_idle_worker_sleeps(monkeypatch: pytest.MonkeyPatch, overlap: str) -> None:
    """Guards the processor of a server that nobody asks anything."""
    num_waits = 0
    wait, strangers = threading.Condition.wait, threading.enumerate()  # a library's may wake up

    def spy(condition: threading.Condition, timeout: float | None = None) -> bool:
        nonlocal num_waits
        num_waits += threading.current_thread() not in strangers
        return wait(condition, timeout)

    monkeypatch.setattr(threading.Condition, "wait", spy)
    with running(overlap=overlap, prefix_cache_bytes=10**6) as worker:
        completion_of(worker.submit(SHORT))
        wait_for(lambda: worker.stats().rows_in_flight == 0)
        time.sleep(0.5)
        before, waits = time.process_time(), num_waits
        time.sleep(0.5)
        assert num_waits == waits  # on a busy machine a thread that spins may get little time
        assert time.process_time() - before < 0.1
        assert completion_of(worker.submit(SHORT)).tokens


@with_and_without_overlap
def test_an_iterator_that_has_nothing_is_left_alone(overlap: str) -> None:
    """Guards the processor again: a source of None was asked without a pause."""
    num_asked = 0

    def requests() -> Iterator[Request | None]:
        nonlocal num_asked
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            num_asked += 1
            yield None
        yield SHORT

    events = list(stream_requests(MODEL, requests(), engine=EngineOptions(overlap=overlap)))  # type: ignore[arg-type]
    assert isinstance(events[-1], Finished) and 2 <= num_asked <= 100


def test_the_next_turn_of_a_chat_knows_the_last() -> None:
    """Guards what an idle moment is for: the answer's own context, read as a prompt would be."""
    model = fresh_model()
    model.prefix_chunk = 4
    worker = Worker(model, None, EngineOptions(prefix_cache_bytes=10**7))
    worker.start()
    o = options(mode="ar", max_new_tokens=11)
    prompt = PROMPTS[2]  # 9 tokens
    answer = completion_of(worker.submit(Request(prompt, o))).tokens
    # Pieces of 4: the prompt has 2 of them; with the answer it is 20 tokens long and has 5.
    cold_cache = PrefixCache(model, 10**7)
    cold_cache.read([*prompt, *answer])
    wait_for(lambda: worker.stats().cache_bytes == cold_cache.stats.cache_bytes)
    turn = [*prompt, *answer, 5, 6, 7]
    second = completion_of(worker.submit(Request(turn, o)))
    worker.stop(0)
    assert second.cached_tokens == 20
    assert worker.stats().cache_saved_tokens == 20 and worker.stats().cache_hits == 1
    cold = Worker(model, None, EngineOptions(prefix_cache_bytes=10**7))
    cold.start()
    alone = completion_of(cold.submit(Request(turn, o)))
    cold.stop(0)
    assert (alone.cached_tokens, alone.tokens) == (0, second.tokens)


def test_idle_work_ends_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a worker that reads the same piece for ever because it cannot keep it."""
    read = watched(monkeypatch, "extend")
    with running(prefix_cache_bytes=100) as worker:
        prompt = prompts_of([70])[0]
        completion_of(worker.submit(Request(prompt, options(mode="ar", max_new_tokens=3))))
        wait_for(lambda: worker.stats().rows_in_flight == 0)
        time.sleep(0.3)
        num_read = len(read)
        time.sleep(0.2)
        assert len(read) == num_read <= 6
        assert worker.stats().cache_bytes == 0


def test_threads_end_with_the_worker() -> None:
    before = threading.active_count()
    with running(overlap="on") as worker:
        completion_of(worker.submit(SHORT))
        end_of(worker.submit(SHORT))
    assert threading.active_count() == before


def test_options_are_checked() -> None:
    """Guards a server that starts with what fails at its first request."""
    with pytest.raises(ValueError, match=r"engine=.* is not of type EngineOptions"):
        Worker(MODEL, engine={"batch_size": 2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_waiting=0 must be at least 1"):
        EngineOptions(max_waiting=0)
