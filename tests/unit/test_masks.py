"""Every mask element by element: True = may attend, past keys first."""

import torch
from torch import Tensor

from twotower import masks


def rows(*patterns: str) -> Tensor:
    """'x.' rows to a bool matrix."""
    return torch.tensor([[symbol == "x" for symbol in pattern] for pattern in patterns])


def test_causal() -> None:
    assert masks.causal(1, 5) is None, "one query sees all keys"
    found = masks.causal(3, 2)
    assert found is not None
    assert torch.equal(found, rows("xxx..", "xxxx.", "xxxxx"))
    first = masks.causal(2, 0)
    assert first is not None
    assert torch.equal(first, rows("x.", "xx"))


def test_past_of_rows() -> None:
    found = masks.past_of_rows(torch.tensor([0, 2, 3]), 3)
    assert found.shape == (3, 1, 1, 3)
    assert torch.equal(found.flatten(1), rows("...", "xx.", "xxx"))


def test_causal_rows() -> None:
    """Keys of a shorter row's padding are hidden; the new tokens follow after the longest past."""
    found = masks.causal_rows(2, torch.tensor([1, 3]), 3)
    assert found.shape == (2, 1, 2, 5)
    assert torch.equal(found[0, 0], rows("x..x.", "x..xx"))
    assert torch.equal(found[1, 0], rows("xxxx.", "xxxxx"))


def test_causal_rows_of_equal_length_are_causal() -> None:
    found = masks.causal_rows(4, torch.tensor([3, 3]), 3)
    plain = masks.causal(4, 3)
    assert plain is not None
    assert torch.equal(found, plain.expand(2, 1, -1, -1))


def test_full_rows() -> None:
    """A block sees all of itself, also what lies before it, whatever the row's past."""
    found = masks.full_rows(2, torch.tensor([0, 1]), 2)
    assert found.shape == (2, 1, 1, 4)
    assert torch.equal(found.flatten(1), rows("..xx", "x.xx"))


def test_block_causal() -> None:
    """Clean columns first: blocks before one's own; then noisy columns: one's own block."""
    expected = rows(
        "......xx....",
        "......xx....",
        "xx......xx..",
        "xx......xx..",
        "xxxx......xx",
        "xxxx......xx",
    )
    found = masks.block_causal(torch.tensor([0, 2, 4]).expand(2, -1), 6, 2)
    assert found.shape == (2, 1, 6, 12)
    assert torch.equal(found[0, 0], expected) and torch.equal(found[1], found[0])
    assert torch.equal(masks.block_causal(torch.tensor([[0]]), 2, 2)[0, 0], rows("..xx", "..xx"))


def test_block_causal_of_chosen_blocks() -> None:
    """The same block twice: each sees the clean ones before it and itself, not its double."""
    expected = rows("xx..x..", "xx...x.", "xxxx..x")
    columns = masks.block_causal(torch.tensor([[2, 2, 4]]), 4, 1)[0, 0]
    assert torch.equal(columns, expected)
