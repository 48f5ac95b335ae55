"""Lookup learns across requests: texts are those of a fresh engine, only passes become fewer."""

import pytest

from tiny_models import prompts_of, tiny_model
from tiny_options import options_of
from tiny_worker import completion_of, end_of, running, wait_for
from twotower import Completion, GenerateOptions, TwoTower, accelerate, generate
from twotower.engine import EngineOptions, Failed, Request, Worker
from twotower.model.backend import PassCosts
from twotower.model.eager import EagerBackend
from twotower.native import library
from twotower.native.backend import NativeBackend

MODEL = tiny_model()
PROMPTS = prompts_of([7, 4, 19]) * 3
OFF = EngineOptions(batch_size=1, lookup_cache_bytes=0)
SHAPE = {"max_new_tokens": 24, "seed": 3, "top_k": 9, "logit_bias": {7: 1.5}}


@pytest.fixture(autouse=True)
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is known is verified."""
    for backend in (EagerBackend, NativeBackend):
        monkeypatch.setattr(backend, "pass_costs", PassCosts({1: 1000.0, 64: 1.0}, row=0.0))


def options(mode: str = "speculative", **changes: object) -> GenerateOptions:
    return options_of(SHAPE, {"mode": mode} | changes)


def lookups(completions: list[Completion]) -> list[int]:
    return [completion.lookup_tokens for completion in completions]


def has_learnt(worker: Worker) -> bool:
    """Whether any text is remembered."""
    return worker._learnt is not None and worker._learnt._slots is not None


def models() -> dict[str, TwoTower]:
    """One whose passes round by their length, and one where they are equal to the bit."""
    try:
        library.library()
    except OSError:
        return {"float32": MODEL}
    dense = tiny_model(hybrid_override_pattern="*-*-")
    return {"float32": MODEL, "int8": accelerate(dense, "native", "int8")}


@pytest.mark.parametrize("name", ["float32", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("drafts", "overlap"), [("lookup", "off"), ("auto", "off"), ("auto", "on"), ("denoiser", "on")]
)
def test_texts_are_those_of_a_fresh_engine(
    name: str, temperature: float, drafts: str, overlap: str
) -> None:
    """Guards texts: what was learnt from other requests must reach drafts alone. The same call has
    the same drafts again, also where the denoiser works meanwhile.
    """
    if (model := models().get(name)) is None:
        pytest.skip("no native library")
    shape = {"temperature": temperature, "logprobs": 0}
    asked = options(drafts=drafts, **shape)
    plain = generate(model, PROMPTS, options("ar", **shape), engine=OFF)
    engine = EngineOptions(batch_size=2, overlap=overlap)  # type: ignore[arg-type]
    found = generate(model, PROMPTS, asked, engine=engine)
    assert [c.tokens for c in found] == [c.tokens for c in plain]
    assert generate(model, PROMPTS, asked, engine=engine) == found
    if name == "int8":
        assert [c.logprobs for c in found] == [c.logprobs for c in plain]


def test_what_was_written_before_is_drafted() -> None:
    """Guards learning itself, which no text shows: a request that comes again takes fewer passes,
    and none fewer where the cache is off or the engine another.
    """
    asked = options(drafts="lookup")
    one = EngineOptions(batch_size=1)
    first, again = (generate(MODEL, PROMPTS[:3] * 2, asked, engine=one)[at::3] for at in (0, 1))
    assert all(new > old + 10 for old, new in map(lookups, (first, again)))
    fresh = [generate(MODEL, [prompt], asked, engine=one)[0] for prompt in PROMPTS[:2] * 2]
    assert fresh[:2] == fresh[2:] == [first[0], fresh[1]]
    assert generate(MODEL, PROMPTS[:2] * 2, asked, engine=OFF) == fresh
    side_by_side = EngineOptions(batch_size=4)
    assert generate(MODEL, PROMPTS[:2] * 2, asked, engine=side_by_side) == fresh


def test_a_server_learns_for_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards texts that were cut, and those from before the thread was started again: both would be
    forgotten.
    """

    def dying(*_: object) -> None:
        raise SystemExit

    request = Request(PROMPTS[0], options(drafts="lookup", max_new_tokens=60))
    with running(batch_size=1) as worker:
        ticket = worker.submit(request)
        wait_for(lambda: len(ticket.row.tokens) > 30)
        ticket.cancel()
        assert isinstance(end_of(ticket), Failed)
        wait_for(lambda: has_learnt(worker))
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "_note_end", dying)
            worker.submit(Request(PROMPTS[1], options("ar", max_new_tokens=1)))
            wait_for(lambda: not worker.stats().is_alive)
        worker.start()
        second = completion_of(worker.submit(request))
    (alone,) = generate(MODEL, [request.prompt], request.options)
    assert second.tokens == alone.tokens and second.lookup_tokens > alone.lookup_tokens + 15


def test_given_texts_teach_nothing() -> None:
    """Guards drafts against what a caller wrote in the model's place, and modes that draft nothing
    against work and memory.
    """
    asked, text = options(drafts="lookup"), tuple(range(5, 30))
    with running(batch_size=1) as worker:
        completion_of(worker.submit(Request(PROMPTS[0], options(logprobs=0), given=text)))
        assert completion_of(worker.submit(Request(PROMPTS[1], options("ar")))).tokens
        assert not has_learnt(worker)
        assert completion_of(worker.submit(Request(PROMPTS[1], asked))).tokens
        wait_for(lambda: has_learnt(worker))
