"""Memory of a pass: what it allocates does not depend on how much text came before."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tiny_models import masked_like, random_ids, tiny_model
from twotower import ContextCache

# Without experts, whose share of the work depends on what the tokens are.
MODEL = tiny_model(hybrid_override_pattern="M*-M*")
SHORT, LONG = 1200, 6400  # both above the tile of the attention kernel, with room in the buffers
KEYS = LONG * 2 * 2 * 8 * 4  # bytes of keys and values of the long prompt in one layer


def allocated(call: Callable[[], object]) -> int:
    """Bytes that a call asks of the allocator, whether or not it gives them back."""
    call()  # a first call may make things that stay
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    memory = [
        event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return sum(max(0, event.nbytes()) for event in memory)


def cache_of(length: int, num_rows: int = 1) -> ContextCache:
    """A prompt of `length` tokens, read, with room for a block behind it."""
    cache = MODEL.prefill(random_ids(num_rows, length))
    MODEL.extend(cache, random_ids(num_rows, 8))
    return cache


PASSES: dict[str, Callable[[ContextCache], Callable[[], object]]] = {
    "denoise": lambda cache: (
        lambda: MODEL.denoise(
            masked_like(random_ids(cache.num_rows, 4)), cache.view(), torch.ones(cache.num_rows)
        )
    ),
    "ar step": lambda cache: lambda: MODEL.extend(cache, random_ids(cache.num_rows, 1)),
    "extend": lambda cache: lambda: MODEL.extend(cache, random_ids(cache.num_rows, 4)),
    "read": lambda cache: lambda: MODEL.verify(cache, random_ids(cache.num_rows, 4)),
}


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_allocates_the_same_after_any_text(name: str, num_rows: int) -> None:
    """Guards long contexts: one copy of the keys a pass and layer makes each token cost the whole
    text again, and shows in no result."""
    short, long = (allocated(PASSES[name](cache_of(n, num_rows))) for n in (SHORT, LONG))
    assert short > 0
    assert long == short


def test_rows_of_different_lengths_allocate_a_mask_at_most() -> None:
    """The same for a ragged batch: a few bytes a key for who sees what, far below the keys."""
    ids = random_ids(2, LONG)
    cache = MODEL.prefill(ids, torch.tensor([LONG, LONG // 2]))
    MODEL.extend(cache, random_ids(2, 8))
    few = MODEL.prefill(ids[:, :SHORT], torch.tensor([SHORT, SHORT // 2]))
    MODEL.extend(few, random_ids(2, 8))
    more = allocated(PASSES["denoise"](cache)) - allocated(PASSES["denoise"](few))
    assert more < KEYS / 2, "two rows of two layers"


def test_the_measure_sees_a_copy_of_the_keys() -> None:
    """Guards the test itself."""
    view = cache_of(LONG).view()
    state = next(state for state in view.layers if hasattr(state, "k"))
    assert allocated(lambda: torch.cat([state.k, state.k[:, :4]], dim=1)) > KEYS / 2
