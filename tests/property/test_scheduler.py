"""What admission and retirement promise: a row's result is its own, slots are refilled at once."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from property.test_decoding import LENGTHS, PROMPTS, every_variant, options
from tiny_models import prompts_of, tiny_model
from twotower import (
    Completion,
    ContextCache,
    Event,
    Finished,
    GenerateOptions,
    TwoTower,
    generate,
    memory,
    stream,
)
from twotower.engine import MODES, EngineOptions, Failed, Request, stream_requests
from twotower.model.rows import append_rows, select_rows

MODEL = tiny_model()
NEW_TOKENS = [9, 1, 6, 14, 3]


def uneven(**changes: object) -> list[GenerateOptions]:
    """Options of five rows that end at different times and draw different samples."""
    return [
        options(seed=seed, max_new_tokens=n, top_k=20, **changes)
        for seed, n in enumerate(NEW_TOKENS)
    ]


def counted_alone(done: list[Completion], each: list[GenerateOptions]) -> list[Completion]:
    """Completions without the counts of drafts, which are as long as pays for the whole batch."""
    shared = dict.fromkeys(("nfe", "context_forwards", "lookup_tokens", "denoiser_tokens"), 0)
    return [
        replace(one, **shared) if own.mode == "speculative" else one
        for one, own in zip(done, each, strict=True)
    ]


@every_variant
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_row_that_enters_late_is_as_alone(
    variant: dict[str, object], temperature: float, batch_size: int
) -> None:
    """Guards admission: a newcomer whose cache is joined in the wrong place, or whose neighbours
    are, writes a fluent text that is another row's."""
    o = uneven(**variant, temperature=temperature)
    alone = [generate(MODEL, [p], own)[0] for p, own in zip(PROMPTS, o, strict=True)]
    engine = EngineOptions(batch_size=batch_size, lookup_cache_bytes=0)
    found = generate(MODEL, PROMPTS, o, engine=engine)
    assert counted_alone(found, o) == counted_alone(alone, o)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    new_tokens=st.lists(st.integers(1, 12), min_size=7, max_size=7),
    modes=st.lists(st.sampled_from(MODES), min_size=7, max_size=7),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_rows_share_any_number_of_places(
    lengths: list[int], new_tokens: list[int], modes: list[str], batch_size: int, seed: int
) -> None:
    """Guards batches of several kinds that come and go side by side."""
    prompts = prompts_of(lengths, seed=seed)
    o = [
        options(mode=mode, max_new_tokens=n, temperature=0.8, seed=seed + i)
        for i, (n, mode, _) in enumerate(zip(new_tokens, modes, lengths, strict=False))
    ]
    alone = [generate(MODEL, [p], own)[0] for p, own in zip(prompts, o, strict=True)]
    engine = EngineOptions(batch_size=batch_size, lookup_cache_bytes=0)
    found = generate(MODEL, prompts, o, engine=engine)
    assert counted_alone(found, o) == counted_alone(alone, o)


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Rows of every call of a method of TwoTower whose first argument is per row."""
    seen: list[int] = []
    method: Callable[..., object] = getattr(TwoTower, name)

    def spy(model: TwoTower, first: Tensor | ContextCache, *rest: object) -> object:
        seen.append(first.num_rows if isinstance(first, ContextCache) else len(first))
        return method(model, first, *rest)

    monkeypatch.setattr(TwoTower, name, spy)
    return seen


def test_a_place_is_refilled_at_the_next_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards throughput: with two slots, one long row and short ones cost the long row's steps."""
    seen = watched(monkeypatch, "verify")
    o = [options(mode="ar", max_new_tokens=n) for n in (8, 2, 2, 2, 2)]
    generate(MODEL, PROMPTS, o, engine=EngineOptions(batch_size=2))
    assert seen == [2, 2, 2, 2, 1, 1, 1]  # of all tokens but each row's first


def test_places_are_shared_by_rows_of_all_kinds() -> None:
    """Guards memory: `batch_size` counts all rows that have a cache, whatever their mode."""
    modes = ["ar", "diffusion", "mock-ar", "diffusion", "ar"]
    o = [options(mode=mode, max_new_tokens=n) for mode, n in zip(modes, NEW_TOKENS, strict=True)]
    opened: set[int] = set()
    most = 0
    for event in stream(MODEL, PROMPTS, o, engine=EngineOptions(batch_size=2)):
        opened.add(event.row)
        most = max(most, len(opened))
        if isinstance(event, Finished):
            opened.remove(event.row)
    assert (most, opened) == (2, set())


def test_rows_enter_in_order_and_end_when_they_end() -> None:
    """Guards fairness and latency: a short late row is reported before a long early one."""
    o = [options(mode="ar", max_new_tokens=n) for n in (9, 3, 2, 5, 1)]
    ends = [
        e.row
        for e in stream(MODEL, PROMPTS, o, engine=EngineOptions(batch_size=2))
        if isinstance(e, Finished)
    ]
    assert ends == [1, 2, 3, 4, 0]  # each row has its first token in the cycle that admits it


def test_little_memory_makes_rows_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the refusal of a list of prompts of which each would fit by itself."""
    o = uneven()
    expected = generate(MODEL, PROMPTS, o)
    weight = MODEL.config.context.kv_elements * 4
    one_row = 3 * (max(LENGTHS) + max(NEW_TOKENS) + 4) * weight
    monkeypatch.setattr(memory, "available_bytes", lambda *_: one_row)
    seen = watched(monkeypatch, "denoise")
    assert generate(MODEL, PROMPTS, o) == expected
    assert max(seen) < len(PROMPTS)


def test_a_source_is_read_when_places_are_free() -> None:
    """Guards offline runs of millions of prompts: rows in memory are those that are decoded."""
    read: list[int] = []

    def requests() -> Iterator[Request | None]:
        for index, prompt in enumerate(PROMPTS * 4):
            yield None  # nothing at present: must be asked again
            read.append(index)
            yield Request(prompt, options(mode="ar", max_new_tokens=3))

    ended = 0
    for event in stream_requests(MODEL, requests(), engine=EngineOptions(batch_size=2)):
        assert len(read) <= ended + 2
        ended += isinstance(event, Finished)
    assert ended == 20 and read == list(range(20))


def test_a_refused_request_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards offline runs: one bad prompt among thousands."""
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 10**6)
    good = options(mode="ar", max_new_tokens=3)
    prompts = [[5], [], prompts_of([20000])[0], [6]]
    events = list(stream_requests(MODEL, (Request(p, good) for p in prompts)))
    failed = {e.row: e.message for e in events if isinstance(e, Failed)}
    assert failed.keys() == {1, 2}
    assert failed[1] == "the prompt is empty; give at least one token"
    assert "a prompt of 20000 tokens in 1 rows needs" in failed[2]
    done: list[Event] = [e for e in events if isinstance(e, Finished)]
    assert {e.row for e in done} == {0, 3}


@pytest.mark.parametrize("lengths", [([4, 9], [1]), ([2], [30, 1]), ([0, 0], [5, 5])])
def test_joined_caches_go_on_as_before(lengths: tuple[list[int], list[int]]) -> None:
    """Guards `append`: keys of rows whose buffers differ in width, states, outputs."""
    caches = []
    for seed, of_rows in enumerate(lengths):
        ids = torch.tensor(
            [p + [0] * (max(*of_rows, 1) - len(p)) for p in prompts_of(of_rows, seed)]
        )
        caches.append(MODEL.prefill(ids, torch.tensor(of_rows)))
    joined = select_rows(caches[0], torch.arange(caches[0].num_rows))
    append_rows(joined, caches[1])
    hidden = [cache.last_hidden for cache in caches]
    assert joined.last_hidden is not None and all(part is not None for part in hidden)
    assert torch.equal(joined.last_hidden, torch.cat([part for part in hidden if part is not None]))
    tokens = torch.tensor(prompts_of([3] * joined.num_rows, seed=7))
    num_first = caches[0].num_rows
    for cache, own in (
        (joined, tokens),
        (caches[0], tokens[:num_first]),
        (caches[1], tokens[num_first:]),
    ):
        MODEL.extend(cache, own)
    apart = torch.cat([MODEL.next_logits(cache) for cache in caches])
    torch.testing.assert_close(MODEL.next_logits(joined), apart, rtol=0, atol=2e-4)
    block = torch.full((joined.num_rows, 4), 3)
    apart = torch.cat(
        [MODEL.denoise(block[: c.num_rows], c.view(), torch.ones(c.num_rows)) for c in caches]
    )
    together = MODEL.denoise(block, joined.view(), torch.ones(joined.num_rows))
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-4)


def test_engine_options_are_checked() -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        EngineOptions(batch_size=0)
    with pytest.raises(ValueError, match="overlap='both' is unknown; use one of auto, on, off"):
        EngineOptions(overlap="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overlap_gives_the_texts_of_one_group(batch_size: int, temperature: float) -> None:
    """Guards the threads: rows of two groups whose work interleaves in any order."""
    modes = itertools.cycle(MODES)
    prompts = prompts_of([1, 7, 2, 19, 4, 3, 30, 5, 8, 2])
    o = [
        options(mode=mode, max_new_tokens=NEW_TOKENS[i % 5], temperature=temperature, seed=i)
        for i, mode in zip(range(len(prompts)), modes, strict=False)
    ]
    two = EngineOptions(overlap="on", batch_size=batch_size)
    assert generate(MODEL, prompts, o, engine=two) == generate(MODEL, prompts, o)


def test_both_towers_are_busy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the gain: the context tower reads the first block of one half of the rows while the
    denoiser drafts that of the other half, or each waits for the other in vain.
    """
    meeting = threading.Barrier(2, timeout=60)
    met, threads = set[str](), dict[str, set[int]](denoise=set(), extend=set())
    long, short = 9, 7  # tokens in the prompts of the halves

    def meet(name: str, method: Callable[..., object], is_time: Callable[..., bool]) -> None:
        def watched(model: TwoTower, *arguments: object) -> object:
            threads[name].add(threading.get_ident())
            if name not in met and is_time(*arguments):
                met.add(name)
                meeting.wait()
            return method(model, *arguments)

        monkeypatch.setattr(TwoTower, name, watched)

    meet("extend", TwoTower.extend, lambda cache, *_: cache.num_past == long)
    meet("denoise", TwoTower.denoise, lambda _, view, *__: view.num_past == short)
    prompts = prompts_of([long, long, short, short])
    done = generate(MODEL, prompts, options(), engine=EngineOptions(overlap="on"))
    assert met == {"denoise", "extend"} and len(done) == 4
    assert len(threads["denoise"]) == len(threads["extend"]) == 1
    assert threads["denoise"] != threads["extend"]


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a thread that dies while the caller waits for ever."""
    monkeypatch.setattr(TwoTower, "denoise", lambda model, block, view, t: block / 0 * float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(MODEL, PROMPTS, options(), engine=EngineOptions(overlap="on"))


def test_a_stream_that_is_left_ends_its_threads() -> None:
    before = threading.active_count()
    events = stream(MODEL, PROMPTS, options(), engine=EngineOptions(overlap="on"))
    next(events)
    events.close()  # type: ignore[attr-defined]  # a generator
    assert threading.active_count() == before


@pytest.mark.parametrize("mode", ["diffusion", "posterior", "predict-and-noise"])
def test_a_second_try_draws_what_the_first_one_did(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Guards rows beside one that fails: noise of the passes before is spent twice, or missing."""
    o = [options(mode=mode, temperature=0.8, seed=seed) for seed in range(2)]
    prompts = PROMPTS[:2]
    expected = generate(MODEL, prompts, o)
    denoise, num_calls = TwoTower.denoise, itertools.count()

    def fails(model: TwoTower, block: Tensor, *rest: object) -> Tensor:
        if len(block) == 2 and next(num_calls) in (2, 5):
            raise RuntimeError
        return denoise(model, block, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TwoTower, "denoise", fails)
    assert generate(MODEL, prompts, o) == expected and next(num_calls) > 3
