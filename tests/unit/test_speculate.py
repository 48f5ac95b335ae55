"""The arithmetic of self-speculation: what is accepted, how much is read, when drafting pauses."""

from types import SimpleNamespace

import pytest
import torch

from twotower.engine.drafts import DraftController, Proposal, best
from twotower.engine.drafts_denoiser import draft_cost, draft_lengths
from twotower.engine.speculative import count_accepted

FIRST_PAUSE, LONGEST_PAUSE = PAUSES = 24, 96


def test_count_accepted() -> None:
    drafts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    choices = torch.tensor([[2, 3, 4, 5], [9, 3, 4, 5], [2, 9, 4, 5], [2, 3, 4, 5]])
    lengths = torch.tensor([4, 4, 4, 2])
    assert count_accepted(drafts, choices, lengths).tolist() == [4, 1, 2, 2]
    assert count_accepted(drafts[:, :1], choices[:, :1], torch.ones(4).long()).tolist() == [1] * 4


def test_draft_lengths() -> None:
    confidence = torch.tensor([[1.0, 0.9, 0.9, 0.9], [1.0, 0.01, 0.9, 0.9], [1.0, 0.5, 0.2, 0.2]])
    assert draft_lengths(confidence).tolist() == [4, 2, 3]


def cost(tokens_of_a_draft: int, num_tokens: int, break_even: float) -> float:
    """AR steps that a text of num_tokens costs when every draft yields the same number."""
    controller, written, spent = DraftController(break_even, 0.5, PAUSES), 0, 0.0
    while written < num_tokens:
        if controller.is_drafting:
            controller.record_draft(tokens_of_a_draft)
            written, spent = written + tokens_of_a_draft, spent + break_even
        else:
            controller.record_other()
            written, spent = written + 1, spent + 1
    return spent


def test_a_text_that_drafts_badly_costs_little() -> None:
    """Guards the promise of at least 0.9 of the speed of AR."""
    for break_even in (2.0, 3.5, 5.0):
        for num_tokens in (128, 256, 1000):
            assert num_tokens / cost(1, num_tokens, break_even) >= 0.9


def test_good_drafts_never_pause() -> None:
    assert cost(9, 900, 5.0) == 100 * 5.0


def test_pauses_double_and_one_good_draft_ends_them() -> None:
    controller, pauses = DraftController(3.0, 0.5, PAUSES), []
    for accepted in (2, 1, 1, 1, 1, 1, 8, 1, 1):
        controller.record_draft(accepted)
        length = 0
        while not controller.is_drafting:
            controller.record_other()
            length += 1
        pauses.append(length)
    doubled = [FIRST_PAUSE, 2 * FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    assert pauses == [0, *doubled, 0, 0, FIRST_PAUSE]


def controller_of(*drafts: int) -> DraftController:
    """One with a break-even of 2 that has seen drafts of so many tokens."""
    found = DraftController(2.0, 0.5, PAUSES)
    for accepted in drafts:
        found.record_draft(accepted)
    return found


def test_the_draft_that_promises_most_is_tried() -> None:
    """Guards the choice between drafters: none that pauses, and the cheap one first."""
    new, good, paused = controller_of(), controller_of(9), controller_of(1, 1)
    assert not paused.is_drafting and good.gain > new.gain > 1
    lookup, denoiser = Proposal("lookup", new, [7]), Proposal("denoiser", controller_of())
    assert best(iter([lookup, denoiser])) is lookup
    assert best(iter([lookup, Proposal("denoiser", good)])) == ("denoiser", good, ())
    assert best(iter([Proposal("lookup", paused, [7]), None, denoiser])) is denoiser
    assert best(iter([Proposal("lookup", paused, [7]), None])) is None


def test_a_thin_denoiser_costs_less() -> None:
    """Guards the break-even of a denoiser with fewer layers than its backbone."""
    towers = SimpleNamespace(
        context=SimpleNamespace(num_layers=30), denoiser=SimpleNamespace(num_layers=3)
    )
    batch = SimpleNamespace(model=SimpleNamespace(config=towers, verify_cost=2.0))
    assert draft_cost(batch, 1) == pytest.approx(2.2)  # type: ignore[arg-type]
    assert draft_cost(batch, 5) == pytest.approx(3.0)  # type: ignore[arg-type]
