"""The denoiser's copy of the cache: it grows by what is new, and texts do not depend on it."""

import copy
import itertools
import queue
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tiny_models import MASK, prompts_of, tiny_model
from tiny_options import options_of
from twotower import ContextCache, Finished, GenerateOptions, TwoTower, accelerate, generate
from twotower.engine import EngineOptions, Request, resolve_options, stream_requests
from twotower.engine.batch import Batch
from twotower.engine.blocks import BLOCKS
from twotower.engine.denoiser import Blocks
from twotower.engine.denoiser_copy import CopyDenoiser, Follower
from twotower.engine.row import Row
from twotower.hosts import Message, SplitTwoTower, serve_blocks
from twotower.hosts.link import END, _packed, _unpacked

MODEL = tiny_model()
PROMPTS = prompts_of([1, 7, 2, 19, 4])


class CopyingTwoTower(TwoTower):
    """A model whose denoiser keeps a copy, as if it were on another device."""

    def __init__(self, model: TwoTower) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)

    def new_denoiser(self) -> CopyDenoiser:
        return CopyDenoiser(self)


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("mode", ["diffusion", "speculative", "posterior"])
def test_texts_are_those_of_a_shared_cache(mode: str, overlap: str) -> None:
    """Guards towers on two devices: a copy that misses a token, or that gives a row another's when
    rows leave and others join, would write plausible text."""
    options = [
        options_of(
            {"confidence_threshold": 0.1},
            {"mode": mode, "max_new_tokens": 5 + 4 * i, "temperature": 0.7 * (i % 2), "seed": i},
        )
        for i in range(len(PROMPTS))
    ]
    engine = EngineOptions(batch_size=2, overlap=overlap)  # type: ignore[arg-type]
    apart = generate(CopyingTwoTower(MODEL), PROMPTS, options, engine=engine)
    assert apart == generate(MODEL, PROMPTS, options, engine=engine)


def _known(part: Tensor, lengths: Tensor) -> Tensor:
    """A state, or keys without what lies behind a row's length."""
    if part.shape[2:] != (2, 8):
        return part
    is_behind = torch.arange(part.shape[1]) >= lengths.unsqueeze(1)
    return part.masked_fill(is_behind[:, :, None, None], 0.0)


@settings(deadline=None)
@given(data=st.data())
def test_a_copy_follows_whatever_becomes_of_a_batch(data: st.DataObject) -> None:
    """Guards rows that leave, come, are tried alone or wait for a while: a copy that mistakes one
    row's keys for another's, or keeps what was read before it failed, writes plausible text."""
    denoiser = CopyDenoiser(MODEL)
    batch = batch_of(denoiser, *range(data.draw(st.integers(1, 4))))
    waiting: list[Batch] = []
    numbers = itertools.count(10)
    for _ in range(data.draw(st.integers(1, 6))):
        change = data.draw(st.sampled_from(["read", "part", "join", "wait", "return", "fail"]))
        if change == "read":
            for row in batch.rows:
                row.tokens += prompts_of([data.draw(st.integers(0, 3))], seed=row.index)[0]
            batch.read()
        elif change == "part" and len(batch.rows) > 1:
            batch = batch.part(
                sorted(data.draw(st.sets(st.sampled_from(range(len(batch.rows))), min_size=1)))
            )
        elif change == "join":
            batch = batch.join(batch_of(CopyDenoiser(MODEL), next(numbers)))
        elif change == "wait" and len(batch.rows) > 1:
            waiting.append(batch.part([0]))
            batch = batch.part(range(1, len(batch.rows)))
        elif change == "return" and waiting:
            batch = batch.join(waiting.pop())
        elif change == "fail":
            batch.rows[0].tokens += [7, 8]
            batch.read()
            denoiser._follower.lacks(batch.rows, batch.cache)  # and the copy never gets it
            continue
        fill(batch)
        assert_same(denoiser._copy.cache, batch.cache)


def batch_of(denoiser: CopyDenoiser, *indices: int) -> Batch:
    """A batch of rows whose prompts have been read."""
    options = resolve_options(GenerateOptions(mode="diffusion", max_new_tokens=99), {})
    rows = [Row(i, prompts_of([1 + i % 5], seed=i)[0], options) for i in indices]
    batch = Batch(MODEL, BLOCKS, rows, MODEL.empty_cache(len(rows)), denoiser=denoiser)
    batch.read()
    return batch


def fill(batch: Batch) -> list[list[int]]:
    blocks = torch.full((len(batch.rows), 4), MASK)
    assert batch.denoiser is not None
    asked = Blocks(blocks, batch.sampler, [], None)
    *_, last = batch.denoiser.fill(batch.rows, batch.cache, asked)
    return last.tokens.tolist()


def assert_same(copy: ContextCache, cache: ContextCache) -> None:
    """The same texts, keys and states."""
    assert copy.lengths.tolist() == cache.lengths.tolist()
    for own, its in zip(copy.layers, cache.layers, strict=True):
        for a, b in zip(own or (), its or (), strict=True):
            assert _known(a, cache.lengths).equal(_known(b, cache.lengths))


def test_only_what_is_new_is_copied() -> None:
    """Guards the line: a copy that is right because it gets the whole cache for every block."""
    batch = batch_of(CopyDenoiser(MODEL), 4, 9)
    follower = Follower()
    sources, delta = follower.lacks(batch.rows, batch.cache)
    assert (sources, delta.counts.tolist()) == ([-1, -1], [5, 5])
    follower.holds(batch.rows, batch.cache)
    batch.rows[1].tokens += [5, 6]
    batch.read()
    rest = batch.part([1])
    sources, delta = follower.lacks(rest.rows, rest.cache)
    assert (sources, delta.counts.tolist()) == ([1], [2])


def test_the_other_rank_fills_blocks_as_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards messages: tensors of a delta, a sampler or a generator that arrive in another's place,
    and a copy that goes on after a block has failed as if it had been brought up to date."""
    there, back = queue.SimpleQueue[Message](), queue.SimpleQueue[Message]()
    other = threading.Thread(target=serve_blocks, args=(MODEL, Wire(back, there)), daemon=True)
    other.start()
    model = SplitTwoTower(MODEL, Wire(there, back))  # type: ignore[arg-type]
    options = [
        GenerateOptions(max_new_tokens=5 + 4 * i, temperature=0.7 * (i % 2), seed=i, mode=mode)
        for i, mode in enumerate(
            ["diffusion", "speculative", "posterior", "diffusion", "diffusion"]
        )  # type: ignore[arg-type]
    ]
    engine = EngineOptions(batch_size=2)
    expected = generate(MODEL, PROMPTS, options, engine=engine)
    assert generate(model, PROMPTS, options, engine=engine) == expected
    denoise, calls = TwoTower.denoise, []

    def broken(model: TwoTower, *arguments: object) -> object:
        calls.append(1)
        if len(calls) % 7 == 0:
            raise RuntimeError("a pass that fails")
        return denoise(model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TwoTower, "denoise", broken)
    requests = [Request(p, o) for p, o in zip(PROMPTS, options, strict=True)]
    ends = [e for e in stream_requests(model, requests, engine=engine) if isinstance(e, Finished)]
    assert len(calls) > 7 and ends
    assert all(end.completion == expected[end.row] for end in ends)
    there.put(Message(END))
    other.join(20)
    assert not other.is_alive()


@pytest.mark.parametrize("kept", ["auto", "float16"])
def test_ranks_compute_in_precisions_of_their_own(kept: str) -> None:
    """Guards a GPU's context in bfloat16 beside a CPU's denoiser, whose native passes keep states
    in float32, or keys in another half: no block was filled."""
    there, back = queue.SimpleQueue[Message](), queue.SimpleQueue[Message]()
    half = copy.deepcopy(MODEL).bfloat16()
    try:
        native = accelerate(half, "native", kv_cache_dtype=kept)  # type: ignore[arg-type]
    except ValueError as error:
        pytest.skip(str(error))
    wire = Wire(back, there)
    other = threading.Thread(target=serve_blocks, args=(native, wire), daemon=True)
    other.start()
    model = SplitTwoTower(half, Wire(there, back))  # type: ignore[arg-type]
    options = GenerateOptions(max_new_tokens=9, mode="diffusion", ignore_eos=True)
    assert [len(done.tokens) for done in generate(model, PROMPTS[:2], options)] == [9, 9]
    there.put(Message(END))
    other.join(20)
    assert not other.is_alive()


def test_ranks_share_keys_in_half_precision() -> None:
    """Guards two hosts with such caches: keys that travel, or that the copy keeps, as other numbers
    give other blocks.
    """
    there, back = queue.SimpleQueue[Message](), queue.SimpleQueue[Message]()
    try:
        native = accelerate(copy.deepcopy(MODEL), "native", kv_cache_dtype="float16")
    except ValueError as error:
        pytest.skip(str(error))
    arguments = native, Wire(back, there)
    other = threading.Thread(target=serve_blocks, args=arguments, daemon=True)
    other.start()
    model = SplitTwoTower(native, Wire(there, back))  # type: ignore[arg-type]
    options = GenerateOptions(max_new_tokens=12, mode="diffusion", ignore_eos=True)
    assert generate(model, PROMPTS[:3], options) == generate(native, PROMPTS[:3], options)
    there.put(Message(END))
    other.join(20)
    assert not other.is_alive()


class Wire:
    """A link of one process: what is sent is received as it would be from another."""

    bytes_sent = bytes_received = 0

    def __init__(
        self, out: "queue.SimpleQueue[Message]", into: "queue.SimpleQueue[Message]"
    ) -> None:
        self._out, self._into = out, into

    def send(self, message: Message) -> None:
        self._out.put(_unpacked(_packed(message)))

    def receive(self) -> Message:
        return self._into.get(timeout=20)

    def close(self) -> None:
        """Nothing to end."""
