"""The arithmetic of self-speculation: what is accepted, how much is read, when drafting pauses."""

from types import SimpleNamespace

import pytest
import torch

from twotower.engine import drafts_denoiser, proposals, speculative
from twotower.engine.batch import Batch
from twotower.engine.drafts import BatchCosts, DraftController, Proposal
from twotower.engine.drafts_denoiser import choose_writers, writing_cost
from twotower.engine.proposals import drafting_of
from twotower.engine.resolved import ResolvedOptions
from twotower.engine.row import Row
from twotower.graphs.passes import count_accepted
from twotower.model.backend import PassCosts
from twotower.model.draft_tree import DraftTree


def test_count_accepted() -> None:
    drafts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    choices = torch.tensor([[2, 3, 4, 5], [9, 3, 4, 5], [2, 9, 4, 5], [2, 3, 4, 5]])
    lengths = torch.tensor([4, 4, 4, 2])
    assert count_accepted(drafts, choices, lengths).tolist() == [4, 1, 2, 2]
    assert count_accepted(drafts[:, :1], choices[:, :1], torch.ones(4).long()).tolist() == [1] * 4


def batch_of(costs: PassCosts, num_rows: int = 1, **towers: int) -> Batch:
    """What drafts ask of a batch: costs of passes and the towers' layers."""
    each = {n: SimpleNamespace(num_layers=v) for n, v in towers.items()}
    model = SimpleNamespace(
        pass_costs=costs, config=SimpleNamespace(**each, mask_token_id=0),
        context_device=torch.device("cpu"), verifies_trees=False,
    )  # fmt: skip
    rows = [Row(index, [5], ResolvedOptions()) for index in range(num_rows)]
    return Batch(model, None, rows, None)  # type: ignore[arg-type]


def test_pass_costs() -> None:
    """Guards passes of more than the longest kind, which end in a short one."""
    costs = BatchCosts(PassCosts({1: 1.0, 4: 1.3, 16: 2.0}))
    found = [costs.of_pass([n]) for n in (1, 2, 4, 5, 16, 17, 32, 36)]
    assert found == pytest.approx([1.0, 1.3, 1.3, 2.0, 2.0, 3.0, 4.0, 5.3])


def test_pass_costs_of_many_rows() -> None:
    """Guards batches against drafts that pay for one row alone: 16 rows take all of the arithmetic
    (measured for int8: 4.1 AR steps of one row, 5.4, 9.1 and 27).
    """
    tokens = {1: 1.0, 4: 1.1, 8: 1.3, 16: 1.9, 32: 3.5, 64: 7.2}
    costs = BatchCosts(PassCosts(tokens, row=0.1, is_padded=False))
    found = [costs.of_pass([length] * 16) for length in (1, 2, 4, 16)]
    assert found == pytest.approx([3.4, 5.0, 8.7, 30.3])


def test_a_longer_row_makes_only_padded_ones_longer() -> None:
    """Guards the price of one row's draft: its own tokens, or as many of each row."""
    costs = PassCosts({1: 1.0, 4: 2.0, 8: 3.0, 16: 9.0}, row=0.5)
    lengths = [5, 1, 1, 1]
    assert BatchCosts(costs._replace(is_padded=False)).of_pass(lengths) == 3.0 + 1.5
    assert BatchCosts(costs).of_pass(lengths) == 9.0 + 2.0 + 1.5
    assert BatchCosts(costs, has_idle_lanes=True).of_pass(lengths) == 3.0


NOTHING = Proposal("lookup")


def cost(tokens_of_a_draft: int, num_tokens: int, break_even: float) -> float:
    """AR steps that a text of num_tokens costs when every draft yields the same number."""
    controller, written, spent = DraftController(8.0, 0.5), 0, 0.0
    while written < num_tokens:
        if controller.expected(NOTHING) > break_even:
            controller.begin((), 0.0)
            controller.record_draft([7] * tokens_of_a_draft)
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


def test_drafts_are_tried_again_and_good_ones_go_on() -> None:
    """Guards long texts: what their first words were like does not decide for ever."""
    controller, cycles = DraftController(8.0, 0.5), list[bool]()
    for number in range(1000):
        is_drafted = controller.expected(NOTHING) > 4.0
        cycles.append(is_drafted)
        if is_drafted:
            controller.record_draft([7] * (1 if number < 500 else 9))
        else:
            controller.record_other()
    assert 1 <= sum(cycles[:100]) <= 4 and 1 <= sum(cycles[200:500]) <= 10
    assert sum(cycles[800:]) > 190


def test_what_a_lookup_knows_a_draft_does_not_add() -> None:
    """Guards texts that repeat: a draft seemed worth all tokens of its cycle, also those that cost
    nothing.
    """
    controller, sure = DraftController(1.0, 2.0), Proposal("lookup", expected=3.0, sure=0.9)
    assert controller.expected(NOTHING) == 2.0 and controller.expected(sure) == pytest.approx(3.1)
    for _ in range(20):
        controller.begin([4, 5, 6], 0.5)
        controller.record_draft([4, 5, 6, 7])
    assert controller.expected(sure) == pytest.approx(3.9, abs=0.2)  # what such cycles yield
    worse = sure._replace(expected=5.0, sure=0.0)
    assert controller.expected(worse) == pytest.approx(5.2, abs=0.1)  # 2 of 12 parts are belief
    controller.begin([4, 9], 0.5)
    controller.record_draft([4, 5, 6, 7])  # two more than instead
    assert controller.expected(worse) == pytest.approx(5.3, abs=0.05)


def rows_that_may_draft(count: int, told: float | None, **options: object) -> Batch:
    batch = batch_of(PassCosts({1: 1.0, 16: 1.5, 256: 1.6}, row=0.0), count, context=30, denoiser=3)
    batch.model.has_denoiser, batch.model.tokens_per_cycle = True, told  # type: ignore[misc]
    given = ResolvedOptions(block_size=5, **options)  # type: ignore[arg-type]
    batch.rows = [Row(index, [5], given) for index in range(count)]
    return batch


@pytest.mark.parametrize(
    ("told", "options", "is_tried"),
    [(1.3, {}, False), (3.5, {}, True), (None, {}, True), (1.3, {"drafts": "denoiser"}, True)],
)
def test_what_is_known_of_a_denoiser_saves_trials(
    told: float | None, options: dict[str, object], is_tried: bool
) -> None:
    """Guards drafts=auto: every text began with a draft of a denoiser that does not pay."""
    batch = rows_that_may_draft(1, told, **options)
    assert choose_writers(batch, [[5]], [NOTHING]) == [0] * is_tried
    batch.rows[0].options = ResolvedOptions(drafts="lookup")
    assert choose_writers(batch, [[5]], [NOTHING]) == []


def test_few_rows_do_not_write_at_the_expense_of_many() -> None:
    """Guards batches: where lookups serve most rows, the others' drafts make all of them wait."""
    batch = rows_that_may_draft(16, 3.5)
    sure = Proposal("lookup", [7], length=2, expected=3.0, sure=0.9)
    assert choose_writers(batch, [[5]] * 16, [NOTHING] * 16) == [*range(16)]
    assert choose_writers(batch, [[5]] * 16, [NOTHING, *[sure] * 15]) == []


def test_padding_of_drafts_that_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a short draft beside a longer one: padding that followed a token would be accepted
    where the tower chooses token 0, and then what was chosen behind that.
    """
    found = [Proposal("lookup", [7, 8], [0, 0]), NOTHING]
    monkeypatch.setattr(proposals, "propose", lambda *_: found)
    monkeypatch.setattr(drafts_denoiser, "choose_writers", lambda *_: [])
    rows = [Row(index, [5], ResolvedOptions(mode="speculative")) for index in range(2)]
    for row in rows:
        row.tokens = [4]
    batch = Batch(None, speculative.SPECULATIVE, rows, None)  # type: ignore[arg-type]
    assert list(speculative.draft(batch)) == []
    drafts, parents = ([draft[at] for draft in batch.drafts] for at in range(2))
    assert drafts == [[4, 7, 8], [4]] and parents == [[-1, 0, 0], [-1]]
    assert DraftTree(parents).paths(drafts, [[7, 0, 0], [0, 0, 0]]) == [[0, 1], [0]]


def test_a_thin_denoiser_costs_less() -> None:
    """Guards the break-even of a denoiser with fewer layers than its backbone."""
    batch = batch_of(PassCosts({1: 1.0, 16: 2.0}), context=30, denoiser=3)
    batch.rows[0].options = ResolvedOptions(draft_passes=1, block_size=16)
    assert writing_cost(batch, 1) == pytest.approx(0.4)
    batch.rows[0].options = ResolvedOptions(draft_passes=5, block_size=32)
    assert writing_cost(batch, 1) == pytest.approx(2.2)


def test_rows_that_write_share_a_pass() -> None:
    """Guards the speed of a batch: each row's drafts would seem to need passes of their own."""
    batch = batch_of(PassCosts({64: 1.0}, row=0.0), num_rows=8, context=30, denoiser=3)
    for row in batch.rows:
        row.options = ResolvedOptions(draft_passes=1, block_size=8)
    assert writing_cost(batch, 1) == pytest.approx(0.3)
    assert writing_cost(batch, 8) == pytest.approx(1.0)


def test_rows_do_not_count_on_an_accelerator() -> None:
    """Guards drafts on a GPU: arithmetic waits for weights; many rows would draft nothing."""
    batch = batch_of(PassCosts({1: 1.0, 4: 1.3, 64: 9.0}), num_rows=8)
    batch.model.context_device = torch.device("meta")
    assert drafting_of(batch).costs.of_pass([4] * 8) == 1.3
