"""The arithmetic of self-speculation: what is accepted, how much is read, when drafting pauses."""

from types import SimpleNamespace

import pytest
import torch

from twotower.engine import speculative
from twotower.engine.batch import Batch
from twotower.engine.drafts import DraftController, Proposal, best, best_length, pass_cost
from twotower.engine.drafts_denoiser import writing_cost
from twotower.engine.options import ResolvedOptions
from twotower.engine.request import Row
from twotower.graphs.passes import count_accepted
from twotower.model.backend import PassCosts
from twotower.model.draft_tree import DraftTree

FIRST_PAUSE, LONGEST_PAUSE = PAUSES = 24, 96


def test_count_accepted() -> None:
    drafts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    choices = torch.tensor([[2, 3, 4, 5], [9, 3, 4, 5], [2, 9, 4, 5], [2, 3, 4, 5]])
    lengths = torch.tensor([4, 4, 4, 2])
    assert count_accepted(drafts, choices, lengths).tolist() == [4, 1, 2, 2]
    assert count_accepted(drafts[:, :1], choices[:, :1], torch.ones(4).long()).tolist() == [1] * 4


def batch_of(costs: PassCosts, num_rows: int = 1, **towers: int) -> Batch:
    """What drafts ask of a batch: costs of passes and the towers' layers."""
    config = SimpleNamespace(**{n: SimpleNamespace(num_layers=v) for n, v in towers.items()})
    model = SimpleNamespace(pass_costs=costs, config=config, context_device=torch.device("cpu"))
    return Batch(model, None, [None] * num_rows, None)  # type: ignore[arg-type, list-item]


def test_best_length() -> None:
    """Guards a draft that costs more than it brings: none of it is verified."""
    assert best_length([1.0, 1.6, 1.9], [1.0, 1.2, 1.2]) == (2, pytest.approx(1.9 / 1.2))
    assert best_length([1.0, 1.1, 1.15], [1.0, 1.2, 1.2]) == (0, 1.0)
    assert best_length([1.0, 1.1], [1.0, 1.2], writing=2.0)[0] == 1


def test_pass_costs() -> None:
    costs = PassCosts({1: 1.0, 4: 1.3, 16: 2.0})
    assert [pass_cost(costs, n) for n in (1, 2, 4, 5, 16, 32)] == [1.0, 1.3, 1.3, 2.0, 2.0, 4.0]


def test_pass_costs_of_many_rows() -> None:
    """Guards batches against drafts that pay for one row alone: 16 rows take all of the arithmetic
    (measured for int8: 1.17, 1.46 and 2.36; 7.9 for 16 tokens of 16 rows).
    """
    costs = PassCosts({1: 1.0, 4: 1.25, 8: 1.55, 16: 2.1, 32: 3.4, 64: 6.5}, row=0.1)
    found = [pass_cost(costs, 4, rows) for rows in (1, 4, 16)]
    assert found == [pytest.approx(cost, abs=0.01) for cost in (1.25, 1.55, 2.22)]
    assert pass_cost(costs, 16, 16) == pytest.approx(7.6, abs=0.1)


def test_a_pass_of_some_rows_is_waited_for_by_all() -> None:
    """Guards batches against a row whose drafts pay for it alone: its neighbours write nothing
    meanwhile. 8 tokens of one row take 1.5 of its AR steps, and half of one of four rows.
    """
    costs = PassCosts({1: 1.0, 4: 2.7, 8: 1.5}, row=0.1)
    assert pass_cost(costs, 8, num_rows=1) == 1.5
    assert pass_cost(costs, 8, num_rows=1, num_waiting=3) == pytest.approx(0.5)


def cost(tokens_of_a_draft: int, num_tokens: int, break_even: float) -> float:
    """AR steps that a text of num_tokens costs when every draft yields the same number."""
    controller, written, spent = DraftController(0.25, PAUSES), 0, 0.0
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
    controller, pauses = DraftController(0.25, PAUSES), []
    for accepted in (2, 1, 1, 1, 1, 1, 8, 1, 1):
        controller.record_draft(accepted / 3)
        length = 0
        while not controller.is_drafting:
            controller.record_other()
            length += 1
        pauses.append(length)
    doubled = [FIRST_PAUSE, 2 * FIRST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    assert pauses == [0, *doubled, 0, 0, FIRST_PAUSE]


def test_a_trial_that_others_wait_for_comes_less_often() -> None:
    """Guards batches: each of 16 rows in turn would make the others wait for its trials."""
    controller, pause = DraftController(0.25, PAUSES), 0
    controller.record_draft(0.4, num_waited=15)
    while not controller.is_drafting:
        controller.record_other()
        pause += 1
    assert pause == 16 * FIRST_PAUSE


def test_padding_of_drafts_that_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a short draft beside a longer one: padding that followed a token would be accepted
    where the tower chooses token 0, and then what was chosen behind that.
    """
    proposals = iter([Proposal("lookup", 2.0, [7, 8], [0, 0]), None])
    monkeypatch.setattr(speculative, "PROPOSE", (lambda *_: next(proposals),))
    rows = [Row(index, [5], ResolvedOptions(mode="speculative")) for index in range(2)]
    for row in rows:
        row.tokens = [4]
    batch = Batch(None, speculative.SPECULATIVE, rows, None)  # type: ignore[arg-type]
    assert list(speculative.draft(batch)) == []
    drafts, lengths, parents = (part.tolist() for part in batch.draft)
    assert (drafts, lengths) == ([[4, 7, 8], [4, 0, 0]], [3, 1])
    assert parents == [[-1, 0, 0], [-1, -1, -1]]
    assert DraftTree(parents).paths(drafts, [[7, 0, 0], [0, 0, 0]]) == [[0, 1], [0]]


def test_the_draft_that_promises_most_is_tried() -> None:
    """Guards the choice between drafters: of equals the first, none where none proposes."""
    lookup, denoiser = Proposal("lookup", 1.5, [7]), Proposal("denoiser", 1.5)
    assert best(iter([lookup, denoiser])) is lookup
    better = denoiser._replace(gain=1.6)
    assert best(iter([None, lookup, better])) is better
    assert best(iter([None, None])) is None


def test_a_thin_denoiser_costs_less() -> None:
    """Guards the break-even of a denoiser with fewer layers than its backbone."""
    row = Row(0, [5], ResolvedOptions(draft_passes=1, block_size=16))
    batch = batch_of(PassCosts({1: 1.0, 16: 2.0}), context=30, denoiser=3)
    assert writing_cost(row, batch, 1) == pytest.approx(0.4)
    row.options = ResolvedOptions(draft_passes=5, block_size=32)
    assert writing_cost(row, batch, 1) == pytest.approx(2.2)


def test_rows_that_write_pay_for_those_that_wait() -> None:
    """Guards the speed of a batch: one row's drafts look cheap to it when all wait for them."""
    row = Row(0, [5], ResolvedOptions(draft_passes=1, block_size=8))
    batch = batch_of(PassCosts({64: 1.0}, row=0.0), num_rows=8, context=30, denoiser=3)
    all_write, one_writes = writing_cost(row, batch, 8), writing_cost(row, batch, 1)
    assert (all_write, one_writes) == (pytest.approx(0.3), pytest.approx(1.7))


def test_rows_do_not_count_on_an_accelerator() -> None:
    """Guards drafts on a GPU: arithmetic waits for weights; many rows would draft nothing."""
    costs = PassCosts({1: 1.0, 4: 1.3, 64: 9.0})
    batch = batch_of(costs, num_rows=8)
    batch.model.context_device = torch.device("meta")
    assert batch.pass_cost(4) == batch.pass_cost(4, 3) == 1.3
