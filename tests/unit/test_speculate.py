"""The arithmetic of self-speculation: what is accepted, how much is read, when drafting pauses."""

import torch

from twotower.engine.speculative import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    DraftController,
    count_accepted,
    draft_lengths,
)


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
    controller, written, spent = DraftController(break_even), 0, 0.0
    while written < num_tokens:
        if controller.is_drafting:
            controller.record_draft(tokens_of_a_draft)
            written, spent = written + tokens_of_a_draft, spent + break_even
        else:
            controller.record_token()
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
    controller, pauses = DraftController(3.0), []
    for accepted in (2, 1, 1, 1, 1, 1, 8, 1, 1):
        controller.record_draft(accepted)
        length = 0
        while not controller.is_drafting:
            controller.record_token()
            length += 1
        pauses.append(length)
    doubled = [FIRST_PAUSE, 2 * FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    assert pauses == [0, *doubled, 0, 0, FIRST_PAUSE]
