"""What a worker promises whatever clients and passes do: a row is no other's affair."""

import contextlib
import dataclasses
import gc
import logging
import weakref
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny_models import prompts_of
from tiny_worker import (
    CULPRIT,
    MODEL,
    SECRET,
    break_rows,
    completion_of,
    end_of,
    failure_of,
    options,
    running,
    wait_for,
)
from twotower import ContextCache, TwoTower, generate
from twotower.engine import (
    MODES,
    Completion,
    Failed,
    Finished,
    Request,
    Stopped,
    Ticket,
    Worker,
)
from twotower.engine.batch import Group
from twotower.engine.events import FailureKind
from twotower.engine.faults import EngineDeadError
from twotower.engine.row import Row
from twotower.engine.scheduler import Scheduler
from twotower.engine.shared_queue import SharedQueue
from twotower.memory import release_memory

PROMPTS = prompts_of([5, 3, 9, 2])
with_and_without_overlap = pytest.mark.parametrize("overlap", ["off", "on"])


def alone(prompt: list[int], **changes: object) -> list[int]:
    """What a row writes that has the machine to itself."""
    return generate(MODEL, [prompt], options(**changes))[0].tokens


@settings(max_examples=8)
@given(
    modes=st.lists(st.sampled_from(MODES), min_size=6, max_size=6),
    patience=st.lists(st.none() | st.integers(1, 5), min_size=6, max_size=6),
    overlap=st.sampled_from(["off", "on"]),
    cache=st.sampled_from([0, 10**6]),
)
def test_rows_that_are_called_off_change_no_other(
    modes: list[str], patience: list[int | None], overlap: str, cache: int
) -> None:
    """Guards the cache when rows leave in the middle of others: a neighbour that goes on with the
    wrong row's state writes a fluent text that is another's."""
    prompts = prompts_of([4, 9, 1, 17, 3, 6])
    num_asked: Counter[int] = Counter()
    method = SharedQueue.abort_reason

    def impatient(queue: SharedQueue, row: Row, now: float) -> FailureKind | None:
        """Each row's client goes before the row's cycle of that number."""
        num_asked[row.index] += 1
        row.is_cancelled |= num_asked[row.index] == patience[row.index]
        return method(queue, row, now)

    def of(i: int) -> dict[str, object]:
        return {"mode": modes[i], "temperature": 0.8, "seed": i, "max_new_tokens": 12}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedQueue, "abort_reason", impatient)
        with running(batch_size=4, overlap=overlap, prefix_cache_bytes=cache) as worker:
            tickets = [worker.submit(Request(p, options(**of(i)))) for i, p in enumerate(prompts)]
            ends = [end_of(ticket) for ticket in tickets]
    for i, end in enumerate(ends):
        if isinstance(end, Failed):
            assert end.kind == "cancelled" and num_asked[i] == patience[i]
        else:
            assert isinstance(end, Finished) and num_asked[i] < (patience[i] or 99)
            assert end.completion.tokens == alone(prompts[i], **of(i))


# Which passes a mode makes: (mode, pass, whether it gives NaN instead of an error).
FAULTS = [
    ("ar", "next_logits", True),
    ("ar", "next_logits", False),
    ("ar", "verify", False),
    ("diffusion", "denoise", True),
    ("diffusion", "denoise", False),
    ("diffusion", "extend", False),
    ("mock-ar", "denoise", True),
    ("mock-ar", "extend", False),
    ("speculative", "next_logits", True),
    ("speculative", "verify", False),
    ("speculative", "denoise", True),
    ("posterior", "denoise", False),
    ("verified", "verify", False),
    ("verified", "next_logits", True),
    ("told", "verify", False),
    ("told", "next_logits", True),
]
# Modes in which the context tower judges blocks before they are committed.
READ_FIRST: dict[str, dict[str, object]] = {
    "verified": {"mode": "diffusion", "first_token": "context", "verify_threshold": 0.1},
    "told": {"mode": "diffusion", "logprobs": 1},
}


def counted(completion: Completion) -> Completion:
    return dataclasses.replace(completion, logprobs=None)


@pytest.mark.parametrize(("mode", "name", "with_nan"), FAULTS)
@with_and_without_overlap
def test_a_broken_row_ends_alone(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    name: str,
    with_nan: bool,
    overlap: str,
) -> None:
    """Guards neighbours and server: one row whose passes fail, in any phase of a cycle. The others
    sample, so that randomness which was spent twice would show; the log must not quote prompts."""
    changes = READ_FIRST.get(mode, {"mode": mode}) | {"temperature": 0.8, "max_new_tokens": 9}
    o = [options(seed=i, **changes) for i in range(5)]
    expected = [generate(MODEL, [p], own)[0] for p, own in zip(PROMPTS, o, strict=False)]
    break_rows(monkeypatch, name, with_nan)
    culprit = prompts_of([CULPRIT + 1], seed=7)[0]
    engine = {"overlap": overlap, "lookup_cache_bytes": 0}  # counts are compared, too
    with running(**engine) as worker, caplog.at_level(logging.INFO):
        rows = list(zip(PROMPTS, o, strict=False))
        rows.insert(2, (culprit, o[4]))
        tickets = [worker.submit(Request(prompt, own)) for prompt, own in rows]
        broken = failure_of(tickets.pop(2))
        # Also their counts; log-probabilities of a row alone differ in the last bits.
        assert [counted(completion_of(ticket)) for ticket in tickets] == list(
            map(counted, expected)
        )
        assert (broken.kind, broken.error) == ("internal", None)
        assert broken.message == "an internal error ended this row; the log has the details"
        again = worker.submit(Request(PROMPTS[0], o[0]))
        assert counted(completion_of(again)) == counted(expected[0])
    assert SECRET not in caplog.text
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and errors[0].startswith("row 2: ")


@with_and_without_overlap
def test_a_row_that_cannot_take_its_tokens_ends_alone(
    monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Guards the moment of commitment, which cannot be repeated: tokenizers, filters, grammars."""
    commit = Row.commit

    def broken(row: Row, *arguments: object) -> object:
        if len(row.prompt) == CULPRIT and row.num_commits == 2:
            raise KeyError(SECRET)
        return commit(row, *arguments)  # type: ignore[arg-type]

    expected = [alone(prompt, mode="ar") for prompt in PROMPTS]
    monkeypatch.setattr(Row, "commit", broken)
    with running(overlap=overlap) as worker:
        prompts = [*PROMPTS, prompts_of([CULPRIT])[0]]  # the others have committed before it
        tickets = [worker.submit(Request(p, options(mode="ar"))) for p in prompts]
        *others, last = tickets
        events = list(last.events())
        assert len(events) == 3 and isinstance(events[-1], Failed)
        assert events[-1].kind == "internal"
        assert [completion_of(ticket).tokens for ticket in others] == expected


@with_and_without_overlap
def test_an_error_of_the_scheduler_ends_rows_but_not_the_worker(
    monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Guards against a thread that dies and a server that accepts what nobody will decode."""
    read, calls = Scheduler._prefill, []

    def broken(scheduler: Scheduler, group: Group) -> object:
        calls.append(group)
        if len(calls) == 2:
            raise RuntimeError(SECRET)
        return read(scheduler, group)

    monkeypatch.setattr(Scheduler, "_prefill", broken)
    with running(overlap=overlap, batch_size=2) as worker:
        tickets = [worker.submit(Request(p, options(mode="ar"))) for p in PROMPTS * 2]
        ends = [end_of(ticket) for ticket in tickets]
        failed = [end for end in ends if isinstance(end, Failed)]
        assert 1 <= len(failed) <= 2 and {end.kind for end in failed} == {"internal"}
        assert worker.stats().is_alive


@with_and_without_overlap
def test_a_dead_worker_tells_everyone_and_takes_no_more(
    monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Guards against a lost peer that is asked again for every request, and rows that wait for it:
    the thread ends, whoever is decoded or waits is told, and whoever comes later is refused.
    """

    def lost(model: TwoTower, cache: ContextCache) -> object:
        raise EngineDeadError("lost the other rank")

    monkeypatch.setattr(TwoTower, "next_logits", lost)
    with running(overlap=overlap, batch_size=1) as worker:
        tickets = []
        with contextlib.suppress(Stopped):
            for _ in range(5):
                tickets.append(worker.submit(Request(PROMPTS[0], options(mode="ar"))))
        assert tickets
        assert {failure_of(ticket).kind for ticket in tickets} == {"stopped"}
        wait_for(lambda: not worker.stats().is_alive)
        assert worker.is_dead and worker.stats().num_failed == len(tickets)
        with pytest.raises(Stopped, match="nothing can be decoded any more"):
            worker.submit(Request(PROMPTS[0], options()))


def test_an_end_is_told_even_if_the_thread_dies_just_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards a client whose row has ended, and is forgotten, before it has heard of it."""
    method = Worker._note_end

    def dying(worker: Worker, event: object, ticket: Ticket) -> None:
        method(worker, event, ticket)
        if isinstance(event, Finished):
            raise SystemExit

    monkeypatch.setattr(Worker, "_note_end", dying)
    with running() as worker:
        ticket = worker.submit(Request(PROMPTS[0], options()))
        wait_for(lambda: not worker.stats().is_alive)
        assert not ticket._events.empty() and completion_of(ticket).tokens


def test_a_new_thread_gives_back_what_the_dead_one_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards memory over restarts: a new prefix cache beside the old one, which waits for the
    garbage collector, or beside the old one's freed pages.
    """
    calls: list[int] = []

    def give_back() -> None:
        calls.append(1)
        release_memory()

    monkeypatch.setattr("twotower.engine.worker.release_memory", give_back)
    note_end = Worker._note_end

    def dying(worker: Worker, event: Finished, ticket: Ticket) -> None:
        note_end(worker, event, ticket)
        raise SystemExit

    with running(prefix_cache_bytes=1 << 20) as worker:
        long = prompts_of([100])[0]
        completion_of(worker.submit(Request(long, options())))
        known = [weakref.ref(worker._prefixes), *map(weakref.ref, worker._prefixes._used)]
        assert len(known) >= 2
        gc.collect()
        gc.disable()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Worker, "_note_end", dying)
                worker.submit(Request(PROMPTS[0], options()))
                wait_for(lambda: not worker.stats().is_alive)
            wait_for(lambda: [one for one in known if one() is not None] == [])
        finally:
            gc.enable()
        assert calls == []
        worker.start()
        assert calls == [1]
        assert completion_of(worker.submit(Request(PROMPTS[0], options()))).tokens


def alive() -> int:
    """Rows, tickets and caches in memory."""
    gc.collect()
    return sum(type(one) in (Row, Ticket, ContextCache) for one in gc.get_objects())


@with_and_without_overlap
def test_nothing_of_an_ended_row_stays(monkeypatch: pytest.MonkeyPatch, overlap: str) -> None:
    """Guards memory over many requests: also of rows that failed (their errors hold frames, and
    these the tensors of a pass), were called off, or nobody listened to."""
    break_rows(monkeypatch, "next_logits", with_nan=True)
    long = prompts_of([CULPRIT])[0]
    with running(overlap=overlap, max_waiting=1000) as worker:
        before, told = alive(), []
        for round in range(3):
            tickets = [worker.submit(Request(PROMPTS[0], options(mode="ar"))) for _ in range(8)]
            tickets += [worker.submit(Request(long, options(mode="ar"))) for _ in range(4)]
            tickets[round].cancel()
            told += [end_of(ticket) for ticket in tickets[4:]]  # as a client may keep them
            completion_of(worker.submit(Request(PROMPTS[1], options())))
        wait_for(lambda: not worker.stats().rows_in_flight)
        del tickets
        # The thread puts its last pass away after the row's end was told; asleep, it still names 3.
        wait_for(lambda: alive() <= before + 3)
        stats = worker.stats()
        assert stats.num_finished + stats.num_failed == len(told) + 15 == 39


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bad=st.lists(st.booleans(), min_size=4, max_size=4))
def test_any_rows_may_be_broken(monkeypatch: pytest.MonkeyPatch, bad: list[bool]) -> None:
    """Guards batches in which several rows fail, all, or none."""
    prompts = prompts_of([CULPRIT + 1 + i if is_bad else 3 + i for i, is_bad in enumerate(bad)])
    expected = [alone(prompt) for prompt in prompts]
    with pytest.MonkeyPatch.context() as patch, running() as worker:
        break_rows(patch, "denoise", with_nan=True)
        tickets = [worker.submit(Request(prompt, options())) for prompt in prompts]
        for ticket, own, is_bad in zip(tickets, expected, bad, strict=True):
            if is_bad:
                assert failure_of(ticket).kind == "internal"
            else:
                assert completion_of(ticket).tokens == own
