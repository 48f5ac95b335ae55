"""The denoiser's copy of the cache: it grows by what is new, and texts do not depend on it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tiny_models import prompts_of, tiny_model
from twotower import GenerateOptions, TwoTower, generate
from twotower.engine import EngineOptions
from twotower.engine.seat import CopySeat, take_seat
from twotower.hosts.link import Message
from twotower.hosts.wire import bundled, delta_to_message, message_to_delta, parts_of

MODEL = tiny_model()
PROMPTS = prompts_of([1, 7, 2, 19, 4])


class CopyingTwoTower(TwoTower):
    """A model whose denoiser keeps a copy, as if it were on another device."""

    def __init__(self, model: TwoTower) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)

    def seat(self) -> CopySeat:
        return CopySeat(self, None)


@pytest.mark.parametrize("queues", ["one", "two"])
@pytest.mark.parametrize("mode", ["diffusion", "speculative", "posterior"])
def test_texts_are_those_of_a_shared_cache(mode: str, queues: str) -> None:
    """Guards towers on two devices: a copy that misses a token, or that gives a row another's when
    rows leave and others join, would write plausible text."""
    options = [
        GenerateOptions(
            mode=mode,  # type: ignore[arg-type]
            max_new_tokens=5 + 4 * i,
            block_size=4,
            confidence_threshold=0.1,
            eos_token_id=None,
            temperature=0.7 * (i % 2),
            seed=i,
        )
        for i in range(len(PROMPTS))
    ]
    engine = EngineOptions(max_rows=2, queues=queues)  # type: ignore[arg-type]
    apart = generate(CopyingTwoTower(MODEL), PROMPTS, options, engine=engine)
    assert apart == generate(MODEL, PROMPTS, options, engine=engine)


@settings(deadline=None)
@given(
    first=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    counts=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    by_wire=st.booleans(),
)
def test_a_copy_catches_up_with_what_is_new_alone(
    first: list[int], counts: list[int], by_wire: bool
) -> None:
    """Guards both halves of the promise: after any uneven commits the copy's keys, states and
    lengths are the cache's, and no more keys than the longest row's new tokens travel per row."""
    ids = torch.randint(4, 41, (3, 6), generator=torch.Generator().manual_seed(sum(first)))
    cache = MODEL.prefill(ids, torch.tensor(first))
    copy = cache.empty_like("cpu")
    copy.apply_delta(cache.delta_since(copy.lengths))
    MODEL.extend(cache, ids[:, :5], torch.tensor(counts))
    delta = cache.delta_since(copy.lengths)
    assert delta.counts.tolist() == counts
    keys = [
        part for state in delta.states if state is not None for part in state if part.dim() == 4
    ]
    assert {part.shape[1] for part in keys if part.shape[2:] == (2, 8)} <= {max(counts), 1}
    if by_wire:
        delta = message_to_delta(delta_to_message(0, delta))
    copy.apply_delta(delta)
    assert copy.lengths.tolist() == cache.lengths.tolist()
    for own, its in zip(copy.layers, cache.layers, strict=True):
        for a, b in zip(own or (), its or (), strict=True):
            assert _known(a, cache.lengths).equal(_known(b, cache.lengths))


def _known(part: Tensor, lengths: Tensor) -> Tensor:
    """A state, or keys without what lies behind a row's length."""
    if part.shape[2:] != (2, 8):
        return part
    is_behind = torch.arange(part.shape[1]) >= lengths.unsqueeze(1)
    return part.masked_fill(is_behind[:, :, None, None], 0.0)


def test_a_seat_that_lives_on_later_updates_does_not_change_a_part() -> None:
    """Guards rows that are tried alone after a failed pass: their seat is a copy of its own."""
    cache = MODEL.prefill(torch.tensor([PROMPTS[1], PROMPTS[1]]))
    seat = take_seat(CopyingTwoTower(MODEL))
    seat.follow(cache)
    part = seat.part(torch.tensor([1]))
    assert isinstance(part, CopySeat) and part.copy is not None
    before = [state.clone() for layer in part.copy.layers for state in layer or ()]
    MODEL.extend(cache, torch.tensor([[5, 6], [7, 8]]))
    seat.follow(cache)
    after = [state for layer in part.copy.layers for state in layer or ()]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


def test_messages_survive_the_bundle() -> None:
    """Guards the order of tensors of several messages in one: a shift gives a row another's
    state."""
    messages = [
        Message("one", {"a": 1}, [torch.arange(3), torch.ones(2, 2, dtype=torch.bfloat16)]),
        Message("none", {"b": [None, True]}),
        Message("two", {}, [torch.tensor([True, False])]),
    ]
    for sent, found in zip(messages, parts_of(bundled(messages)), strict=True):
        assert (sent.kind, sent.values) == (found.kind, found.values)
        assert all(a.equal(b) for a, b in zip(sent.tensors, found.tensors, strict=True))
