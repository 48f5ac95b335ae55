"""The arithmetic of self-speculation: what is accepted, how much is read, when drafting pauses."""

from types import SimpleNamespace

import pytest
import torch

from twotower.diffusion import count_accepted
from twotower.engine.drafts import DraftController, Proposal, best, pass_cost
from twotower.engine.drafts_denoiser import draft_lengths, writing_cost
from twotower.engine.options import ResolvedOptions
from twotower.engine.request import Row

FIRST_PAUSE, LONGEST_PAUSE = PAUSES = 24, 96


def test_count_accepted() -> None:
    drafts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    choices = torch.tensor([[2, 3, 4, 5], [9, 3, 4, 5], [2, 9, 4, 5], [2, 3, 4, 5]])
    lengths = torch.tensor([4, 4, 4, 2])
    assert count_accepted(drafts, choices, lengths).tolist() == [4, 1, 2, 2]
    assert count_accepted(drafts[:, :1], choices[:, :1], torch.ones(4).long()).tolist() == [1] * 4


def test_draft_lengths() -> None:
    """Guards drafts that are verified beyond what pays, or cut where more costs nothing."""
    confidence = torch.tensor([[1.0, 0.9, 0.9, 0.9], [1.0, 0.01, 0.9, 0.9], [1.0, 0.5, 0.2, 0.2]])
    no_writing, flat, steep = torch.zeros(3), {4: 1.3}, {1: 1.0, 2: 1.1, 3: 1.6, 4: 2.0}
    assert draft_lengths(confidence, flat, no_writing).tolist() == [4, 4, 4]
    assert draft_lengths(confidence, steep, no_writing).tolist() == [2, 2, 2]
    # 1.9 / 11.1, 2.71 / 11.6, 3.44 / 12; 1.5, 1.6, 1.62
    assert draft_lengths(confidence, steep, torch.full((3,), 10.0)).tolist() == [4, 2, 3]


def test_pass_costs() -> None:
    costs = {1: 1.0, 4: 1.3, 16: 2.0}
    assert [pass_cost(costs, n) for n in (1, 2, 4, 5, 16, 32)] == [1.0, 1.3, 1.3, 2.0, 2.0, 4.0]


def cost(tokens_of_a_draft: int, num_tokens: int, break_even: float) -> float:
    """AR steps that a text of num_tokens costs when every draft yields the same number."""
    controller, written, spent = DraftController(0.5, PAUSES), 0, 0.0
    while written < num_tokens:
        if controller.is_drafting:
            controller.record_draft(tokens_of_a_draft / break_even)
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
    controller, pauses = DraftController(0.5, PAUSES), []
    for accepted in (2, 1, 1, 1, 1, 1, 8, 1, 1):
        controller.record_draft(accepted / 3)
        length = 0
        while not controller.is_drafting:
            controller.record_other()
            length += 1
        pauses.append(length)
    doubled = [FIRST_PAUSE, 2 * FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    assert pauses == [0, *doubled, 0, 0, FIRST_PAUSE]


def controller_of(*gains: float) -> DraftController:
    """One that has seen drafts."""
    found = DraftController(0.5, PAUSES)
    for gain in gains:
        found.record_draft(gain)
    return found


def test_the_draft_that_promises_most_is_tried() -> None:
    """Guards the choice between drafters: none that pauses, of equals the first."""
    new, good, paused = controller_of(), controller_of(4.5), controller_of(0.5, 0.4)
    assert not paused.is_drafting and good.gain > new.gain > 1
    lookup, denoiser = Proposal("lookup", new, [7]), Proposal("denoiser", controller_of())
    assert best(iter([lookup, denoiser])) is lookup
    assert best(iter([lookup, Proposal("denoiser", good)])) == ("denoiser", good, (), 0.0)
    assert best(iter([Proposal("lookup", paused, [7]), None, denoiser])) is denoiser
    assert best(iter([Proposal("lookup", paused, [7]), None])) is None


def test_a_thin_denoiser_costs_less() -> None:
    """Guards the break-even of a denoiser with fewer layers than its backbone."""
    towers = SimpleNamespace(
        context=SimpleNamespace(num_layers=30), denoiser=SimpleNamespace(num_layers=3)
    )
    batch = SimpleNamespace(model=SimpleNamespace(config=towers, pass_costs={16: 2.0}))
    row = Row(0, [5], ResolvedOptions(draft_passes=1))
    assert writing_cost(row, batch) == pytest.approx(0.2)  # type: ignore[arg-type]
    row.options = ResolvedOptions(draft_passes=5, block_size=32)
    assert writing_cost(row, batch) == pytest.approx(2.0)  # type: ignore[arg-type]
