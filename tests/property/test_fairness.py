"""Places are shared: nobody waits for somebody else's long text, and no text depends on it."""

import itertools
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from property.test_cache import assert_same_rows
from tiny_models import prompts_of
from tiny_worker import MODEL, completion_of, end_of, failure_of, options, running, wait_for
from twotower import ContextCache, Event, Finished, TokensCommitted, TwoTower, generate, memory
from twotower.engine import (
    MODES,
    EngineOptions,
    Failed,
    Request,
    Ticket,
    resolve_options,
)
from twotower.engine import scheduler as scheduling
from twotower.engine.batch import Batch
from twotower.engine.request import make_row
from twotower.engine.row import Row
from twotower.engine.scheduler import READ_TOKENS, Scheduler
from twotower.engine.shared_queue import TURN, SharedQueue
from twotower.model.rows import select_rows

PROMPT = prompts_of([5])[0]
LONG = options(mode="ar", max_new_tokens=100_000)
SHORT = options(mode="ar", max_new_tokens=3)


def request(caller: str | None, o: object = SHORT, prompt: list[int] = PROMPT) -> Request:
    return Request(prompt, o, caller=caller)  # type: ignore[arg-type]


def set_chunk(patch: pytest.MonkeyPatch, size: int) -> None:
    """Prompts in passes of so many tokens, in decoding as in `prefill`."""
    patch.setattr("twotower.engine.scheduler.PREFILL_CHUNK", size)
    patch.setattr("twotower.model.two_tower.PREFILL_CHUNK", size)


@settings(max_examples=15, deadline=None)
@given(
    modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=2),  # so that rows share batches
    rows=st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(1, 30), st.integers(1, 40)),
        min_size=4,
        max_size=8,
    ),
    batch_size=st.integers(1, 4),
    overlap=st.sampled_from(["off", "on"]),
    cache=st.sampled_from([0, 10**6]),
    learns=st.booleans(),
    temperature=st.sampled_from([0.0, 0.8]),
)
def test_a_row_that_was_paused_writes_what_it_writes_alone(
    modes: list[str],
    rows: list[tuple[str | None, int, int]],
    batch_size: int,
    overlap: str,
    cache: int,
    learns: bool,
    temperature: float,
) -> None:
    """Guards pauses, in prompts and between cycles: a row that goes on with less than all of its
    state, its randomness or its draft controller writes a fluent text that is not its own."""
    prompts = prompts_of([length for *_, length in rows])
    o = [
        options(mode=modes[i % len(modes)], max_new_tokens=n, temperature=temperature, seed=i)
        for i, (_, n, _) in enumerate(rows)
    ]
    alone = [generate(MODEL, [p], own)[0] for p, own in zip(prompts, o, strict=True)]
    requests = [
        request(caller, own, prompt)
        for (caller, _, _), own, prompt in zip(rows, o, prompts, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twotower.engine.shared_queue.TURN", 1)  # so that slots change hands often
        patch.setattr("twotower.engine.scheduler.READ_TOKENS", 8)
        set_chunk(patch, 4)
        kept = {"prefix_cache_bytes": cache, "lookup_cache_bytes": 10**5 * learns}
        with running(batch_size=batch_size, overlap=overlap, **kept) as worker:
            tickets = [worker.submit(one) for one in requests]
            done = [completion_of(ticket) for ticket in tickets]
    for found, expected in zip(done, alone, strict=True):
        assert found.tokens == expected.tokens
        if not learns:  # whose drafts, and so its passes, are of earlier texts
            assert found.nfe == expected.nfe
        if not learns and not cache:
            assert found.context_forwards == expected.context_forwards


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_one_caller_s_long_rows_make_room_for_others(overlap: str) -> None:
    """Guards everybody behind a request of n long rows: until its deadline nobody else would get a
    slot."""
    with running(batch_size=4, overlap=overlap) as worker:
        greedy = [worker.submit(request("greedy", LONG)) for _ in range(32)]
        wait_for(lambda: worker.stats().tokens > 40)
        for caller in ("one", "two", "three"):
            done = [worker.submit(request(caller), deadline_s=60) for _ in range(2)]
            assert all(len(completion_of(ticket).tokens) == 3 for ticket in done)
        # A row as long as theirs gets its share, too.
        long = options(mode="ar", max_new_tokens=200)
        fair = worker.submit(request("fair", long), deadline_s=60)
        assert len(completion_of(fair).tokens) == 200
        assert all(ticket.row.finish_reason is None for ticket in greedy)


def test_a_caller_s_own_long_rows_make_room_for_its_short_ones() -> None:
    with running(batch_size=2) as worker:
        long = [worker.submit(request("a", LONG)) for _ in range(4)]
        wait_for(lambda: worker.stats().tokens > 40)
        assert len(completion_of(worker.submit(request("a"), deadline_s=60)).tokens) == 3
        wait_for(lambda: all(len(ticket.row.tokens) > 20 for ticket in long))


def test_rows_of_no_caller_keep_their_places() -> None:
    """Guards files of prompts: of a million rows only those that are decoded are in memory."""
    with running(batch_size=1) as worker:
        first, second = worker.submit(request(None, LONG)), worker.submit(request(None))
        wait_for(lambda: len(first.row.tokens) > 10 * TURN)
        assert second.row.started_s is None
        first.cancel()
        assert completion_of(second).tokens


def scheduler_of(requests: list[Request], batch_size: int) -> Scheduler:
    """A scheduler in whose queue all requests are from the beginning."""
    rows = [make_row(MODEL, i, one, None, "it") for i, one in enumerate(requests)]
    queue = SharedQueue(rows)
    queue.count(len(rows))
    return Scheduler(MODEL, queue, EngineOptions(batch_size=batch_size))


def steps_of(requests: list[Request], batch_size: int, num_steps: int) -> list[list[Event]]:
    """The events of each of the first steps."""
    scheduler = scheduler_of(requests, batch_size)
    return [list(scheduler.step()) for _ in range(num_steps)]


def test_callers_with_as_much_to_do_write_as_much() -> None:
    """Guards against one who sends more rows and so gets more of the machine, and against rows that
    change slots all the time."""
    requests = [request("a", LONG) for _ in range(12)] + [request("b", LONG) for _ in range(4)]
    events = [e for step in steps_of(requests, 4, 200) for e in step]
    written: Counter[str] = Counter()
    for event in events:
        if isinstance(event, TokensCommitted):
            written["a" if event.row < 12 else "b"] += 1
    assert abs(written["a"] - written["b"]) < 0.1 * written.total()
    rows = [e.row for e in events if isinstance(e, TokensCommitted)]
    steps = [set(rows[i : i + 4]) for i in range(0, len(rows) - 4, 4)]
    changes = sum(len(new - old) for old, new in itertools.pairwise(steps))
    assert changes < 60, "of 800 tokens"


def test_the_queue_has_room_for_another_caller() -> None:
    """Guards a queue that one caller fills: everybody else would be told to come later."""
    with running(batch_size=1, max_waiting=20) as worker:
        worker.submit(request("greedy", LONG))
        wait_for(lambda: worker.stats().rows_in_flight == 1)
        count = 0
        with pytest.raises(Exception, match="requests wait already"):
            for _ in range(30):
                worker.submit(request("greedy", LONG))
                count += 1
        assert 10 < count < 20
        assert completion_of(worker.submit(request("other"), deadline_s=60)).tokens


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    budgets=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    leaving=st.integers(0, 3),
)
def test_a_prompt_in_pieces_is_read_as_at_once(
    lengths: list[int], budgets: list[int], leaving: int
) -> None:
    """Guards texts against what else goes on while a prompt is read: pieces that end elsewhere are
    summed in another order, and what a row writes would depend on its neighbours."""
    o = resolve_options(SHORT, {})
    rows = [Row(i, prompt, o) for i, prompt in enumerate(prompts_of(lengths))]
    with pytest.MonkeyPatch.context() as patch:
        set_chunk(patch, 5)
        patch.setattr(scheduling, "READ_TOKENS", 10**6)
        for batch in scheduling.open_batches(MODEL, rows, are_alone=False):
            for budget in itertools.cycle(budgets):
                patch.setattr(scheduling, "READ_TOKENS", budget * len(batch.rows))
                scheduling.read_prompts(batch, None)
                if batch.has_read:
                    break
                if leaving < len(batch.rows) > 1:
                    batch = batch.part([i for i in range(len(batch.rows)) if i != leaving])
            for slot, row in enumerate(batch.rows):
                own = select_rows(batch.cache, torch.tensor([slot]))
                alone = MODEL.prefill(torch.tensor([row.prompt]))
                # The same passes beside other rows: equal but for the order of sums in a matrix
                # product of other height.
                assert_same_rows(own, 0, alone, 0)
                assert (row.context_forwards, own.lengths.tolist()) == (1, [len(row.prompt)])


def test_pieces_end_where_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the same by the sizes of the passes, whatever the budget and the neighbours."""
    set_chunk(monkeypatch, 7)
    sizes: list[int] = []
    extend = TwoTower.extend

    def spy(model: TwoTower, cache: ContextCache, ids: Tensor, *counts: Tensor) -> Tensor:
        sizes.append(ids.shape[1])
        return extend(model, cache, ids, *counts)

    monkeypatch.setattr(TwoTower, "extend", spy)
    MODEL.prefill(torch.tensor(prompts_of([61])))
    expected = list(sizes)
    for budget in (1, 7, 1000):
        monkeypatch.setattr(scheduling, "READ_TOKENS", budget)
        row = Row(0, prompts_of([61])[0], resolve_options(SHORT, {}))
        (batch,) = scheduling.open_batches(MODEL, [row], are_alone=True)
        sizes.clear()
        while not batch.has_read:
            scheduling.read_prompts(batch, None)
        assert sizes == expected


def watch_reads(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[int]:
    """Tokens of every pass over a prompt."""
    reads: list[int] = []
    extend = TwoTower.extend

    def spy(
        model: TwoTower, cache: ContextCache, ids: Tensor, counts: Tensor | None = None
    ) -> Tensor:
        if ids.shape[1] > 1:
            reads.append(ids.numel())
            time.sleep(seconds)
        return extend(model, cache, ids, counts)

    monkeypatch.setattr(TwoTower, "extend", spy)
    return reads


def test_others_decode_while_a_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards streams that stand still: between two pieces of a long prompt all others go on."""
    reads = watch_reads(monkeypatch)
    many = 10 * READ_TOKENS
    requests = [request("a", LONG), request("b", SHORT, prompts_of([many])[0])]
    steps = steps_of(requests, 2, 14)
    assert max(reads) <= READ_TOKENS and sum(reads) >= many
    first_of_b = next(
        i for i, step in enumerate(steps) for e in step if isinstance(e, TokensCommitted) and e.row
    )
    assert first_of_b >= 9  # its first token comes with the last piece
    for step in steps[:first_of_b]:
        assert [e.row for e in step if isinstance(e, TokensCommitted)] == [0]


@pytest.mark.parametrize("caller", ["a", "b"])
def test_a_short_prompt_does_not_wait_for_a_long_one(caller: str) -> None:
    """Guards the first token of a small question behind somebody's books, or one's own."""
    books = [request("a", SHORT, prompts_of([3 * READ_TOKENS], i)[0]) for i in range(7)]
    steps = steps_of([*books, request(caller)], 8, 3)
    begun = {e.row for step in steps for e in step if isinstance(e, TokensCommitted)}
    assert begun == {7}


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_prompts_of_a_client_that_left_are_not_read(
    monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Guards the machine: long prompts of which nobody will hear the answer."""
    reads = watch_reads(monkeypatch, seconds=0.005)
    prompts = prompts_of([4 * READ_TOKENS] * 20)
    with running(batch_size=16, overlap=overlap) as worker:
        tickets = [worker.submit(request("gone", SHORT, prompt)) for prompt in prompts]
        wait_for(lambda: len(reads) > 2)
        for ticket in tickets:
            ticket.cancel()
        count = len(reads)
        ends = [failure_of(ticket) for ticket in tickets]
        assert {end.kind for end in ends} == {"cancelled"}
        assert completion_of(worker.submit(request("here"))).tokens
        assert len(reads) <= count + 2 * (READ_TOKENS // 512) + 2
        assert {ticket.row.started_s is None for ticket in tickets} == {False, True}


def test_a_deadline_is_kept_while_prompts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an answer that is late by all that stands before it."""
    watch_reads(monkeypatch, seconds=0.02)
    prompts = prompts_of([20 * READ_TOKENS] * 4)
    with running() as worker:
        start = time.monotonic()
        tickets: list[Ticket] = [
            worker.submit(request("a", SHORT, prompt), deadline_s=0.3) for prompt in prompts
        ]
        assert {failure_of(ticket).kind for ticket in tickets} == {"deadline"}
        # At least a second and a half of pauses alone if the prompts were read to their end.
        assert 0.3 <= time.monotonic() - start < 1.2


def test_little_memory_lets_paused_rows_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a new row that does not fit while those that were paused hold the memory: it must wait
    for them, not fail, and they must not wait behind it."""
    free = [10**9]
    monkeypatch.setattr(memory, "available_bytes", lambda *_: free[0])
    monkeypatch.setattr("twotower.engine.shared_queue.TURN", 1)
    lengths = (60, 3, 5)
    requests = [
        request(caller, options(mode="ar", max_new_tokens=n))
        for caller, n in zip("abc", lengths, strict=True)
    ]
    ends: list[int] = []
    for event in scheduler_of(requests, batch_size=1).run():
        if isinstance(event, TokensCommitted) and event.row == 1:
            free[0] = 0
        if isinstance(event, Finished | Failed):
            assert isinstance(event, Finished)
            ends.append(event.row)
            free[0] = 10**9 if event.row == 0 else free[0]
    assert ends == [1, 0, 2]


def test_a_row_that_never_fits_fails_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    one_row = 3 * (5 + 60 + 4) * MODEL.config.context.kv_elements * 4
    monkeypatch.setattr(memory, "available_bytes", lambda *_: one_row)
    monkeypatch.setattr("twotower.engine.shared_queue.TURN", 1)
    o = options(mode="ar", max_new_tokens=60)
    requests = [request(caller, o) for caller in "abcabc"]
    too_large = request("d", SHORT, prompts_of([9000])[0])
    events = list(scheduler_of([*requests, too_large], batch_size=2).run())
    ends = {e.row: type(e) for e in events if isinstance(e, Finished | Failed)}
    assert ends == {**dict.fromkeys(range(6), Finished), 6: Failed}


def test_a_row_that_lost_its_place_gets_it_back_while_others_come() -> None:
    """Guards long texts under load: new rows that always come first let a paused one wait for
    minutes, until its client gives up."""
    queue, number = SharedQueue(max_waiting=1000), itertools.count()

    def put(length: int) -> None:
        asked = request("a", options(mode="ar", max_new_tokens=length))
        assert queue.put(make_row(MODEL, next(number), asked, None, "it"))

    scheduler = Scheduler(MODEL, queue, EngineOptions(batch_size=3))
    ended: list[int] = []
    put(60)
    while 0 not in ended and next(number) < 2000:
        for _ in range(max(0, 6 - queue.num_waiting)):
            put(12)
        ended += [event.row for event in scheduler.step() if isinstance(event, Finished)]
    assert 0 in ended
    assert 10 < len(ended) < 200, "it did make room, and did not wait for all others"


@pytest.mark.parametrize("name", ["put_back", "take"])
def test_a_row_on_its_way_is_not_lost_with_the_thread(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a client that waits for ever: a thread that dies while a row gets or loses its slot
    leaves it neither among the rows that have one nor among those that wait."""
    method, deaths = getattr(SharedQueue, name), [1]

    def dying(queue: SharedQueue, row: Row, *known: Batch) -> Batch | None:
        paused = method(queue, row) if name == "take" else None
        if (known or paused is not None) and deaths:
            deaths.pop()
            raise SystemExit
        if known:
            method(queue, row, *known)
        return paused

    monkeypatch.setattr(SharedQueue, name, dying)
    with running(batch_size=1) as worker:
        long = worker.submit(request("a", options(mode="ar", max_new_tokens=200)))
        wait_for(lambda: len(long.row.tokens) > TURN)
        others = [worker.submit(request("a")) for _ in range(3)]
        wait_for(lambda: not worker.stats().is_alive)
        worker.start()
        assert failure_of(long).kind == "internal"
        assert all(end_of(one) for one in others)  # the one that got the slot may fail as well
