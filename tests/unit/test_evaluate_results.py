"""Adding up: accuracies, paired intervals, costs, traces, loops."""

import math

import numpy as np
import pytest

pytest.importorskip("jsonschema")

from tiny_models import tiny_model
from tiny_text import tiny_tokenizer
from twotower.cli.evaluate import EvaluateOptions
from twotower.engine import GenerateOptions
from twotower.lab.corpus import Document
from twotower.lab.evaluate.results import (
    PASS_LIMITS,
    THRESHOLDS,
    interval,
    kendall_tau,
    measure,
    resample_means,
    retention,
    settings,
    summarise,
    summarise_traces,
)
from twotower.lab.evaluate.run import (
    Answer,
    Item,
    Subject,
    Trace,
    draw_groups,
    is_loop,
)


def item(category: str, ar: bool, diffusion: bool, index: int = 0) -> Item:
    def judged(correct: bool, tokens: int, nfe: int, seconds: float) -> Answer:
        return Answer(
            text="x", tokens=tokens, nfe=nfe, context_forwards=3, seconds=seconds,
            degenerate=False, correct=correct,
        )  # fmt: skip

    return Item(
        document=Document(category=category, prompt="p", completion="c", key="k", answer={}),
        index=index,
        prompt_tokens=5,
        answers={"ar": judged(ar, 20, 0, 0.4), "diffusion": judged(diffusion, 16, 4, 0.1)},
    )


def test_accuracy_retention_and_costs() -> None:
    items = [item("math", True, n < 6) for n in range(8)] + [item("code", False, False)] * 2
    record = measure(items, ["ar", "diffusion"], seed=0)
    ar, diffusion = record["ar"], record["diffusion"]
    assert ar["accuracy"] == 0.8 and ar["correct"] == 8 and ar["n"] == 10
    assert diffusion["accuracy"] == 0.6 and diffusion["retention"] == pytest.approx(0.75)
    assert ar["retention"] == 1.0 and ar["retention_interval"] == [1.0, 1.0]
    assert diffusion["tokens"] == 160 and diffusion["nfe"] == 40
    assert diffusion["tokens_per_nfe"] == 4.0 and ar["tokens_per_nfe"] is None
    assert ar["same_as_ar"] == diffusion["same_as_ar"] == 10
    assert ar["tokens_per_forward"] == 19 / 2 and diffusion["tokens_per_forward"] == 15 / 2
    assert diffusion["tokens_per_s"] == pytest.approx(160.0)
    # 0.02 s a token against 0.00625 s
    assert diffusion["speed_ratio"] == pytest.approx(3.2)
    both = summarise(items, ["ar", "diffusion"], seed=0)
    assert both["categories"]["math"]["diffusion"]["retention"] == 0.75
    assert both["categories"]["code"]["diffusion"]["retention"] is None
    assert both["modes"] == record


def test_without_a_baseline_there_is_no_retention() -> None:
    record = measure([item("math", True, True)] * 3, ["diffusion"], seed=0)["diffusion"]
    assert record["retention"] is None and record["speed_ratio"] is None
    assert record["retention_interval"] == [None, None]


def test_the_bootstrap_keeps_pairs_together() -> None:
    """Silent failure: modes resampled apart, whose retention then looks far less certain."""
    same = np.array([[1.0, 0.0] * 50, [1.0, 0.0] * 50])
    ratios = retention(resample_means(same, seed=0), 1, 0)
    assert np.all(ratios == 1.0)
    differ = np.array([[1.0, 0.0] * 50, [0.0, 1.0] * 50])
    low, high = interval(retention(resample_means(differ, seed=0), 1, 0))
    assert low < 0.75 and high > 1.3


def test_the_bootstrap_is_that_of_single_items() -> None:
    """Silent failure: counting kinds of items instead of items changes the distribution."""
    correct = np.array([[1.0] * 30 + [0.0] * 10, [1.0] * 20 + [0.0] * 15 + [1.0] * 5])
    means = resample_means(correct, seed=3)
    generator = np.random.default_rng(9)
    items = generator.integers(0, 40, size=(10_000, 40))
    plain = correct[:, items].mean(axis=2).T  # (10000, modes): every item drawn by its number
    assert means.shape == plain.shape
    assert means.mean(axis=0) == pytest.approx(plain.mean(axis=0), abs=0.005)
    exact = np.cov(correct, bias=True) / 40
    assert np.cov(means.T) == pytest.approx(exact, abs=2.5e-4)  # four standard errors
    ours, theirs = (interval(retention(drawn, 1, 0)) for drawn in (means, plain))
    assert ours == pytest.approx(theirs, abs=0.03)


def test_intervals_match_the_binomial() -> None:
    correct = np.array([[1.0] * 160 + [0.0] * 40])
    low, high = interval(resample_means(correct, seed=1)[:, 0])
    error = 1.96 * math.sqrt(0.8 * 0.2 / 200)
    assert low == pytest.approx(0.8 - error, abs=0.01)
    assert high == pytest.approx(0.8 + error, abs=0.01)
    assert np.array_equal(resample_means(correct, seed=1), resample_means(correct, seed=1))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5] * 16, True),
        ([1, 2, 3] + [7, 8] * 8, True),
        ([9] + list(range(10)) * 4, True),
        ([5] * 15, False),
        (list(range(10)) * 3, False),
        (list(range(100)), False),
        ([1, 0, 0, 0, 0, 0], False),
    ],
)
def test_loops(tokens: list[int], expected: bool) -> None:
    """Silent failure: a text that repeats to the end counts as merely wrong."""
    assert is_loop(tokens) is expected


def test_traces() -> None:
    trace = Trace(
        steps=[(0, 4), (1, 2), (0, 2)], commits=[[1, 1, 2, 4], [1, 2, 2, 2], [2, 1, 1, 1]]
    )
    found = summarise_traces({"diffusion": trace, "ar": Trace()})
    assert list(found) == ["diffusion"]
    assert found["diffusion"]["steps_by_block"] == [3.0, 2.0]
    assert found["diffusion"]["blocks"] == [2, 1]
    assert found["diffusion"]["commit_step_by_position"] == pytest.approx(
        [4 / 3, 4 / 3, 5 / 3, 7 / 3]
    )
    short = Trace(steps=[(0, 2), (1, 1)], commits=[[1, 2, 2], [1]])
    found = summarise_traces({"diffusion": short})
    assert found["diffusion"]["commit_step_by_position"] == [1.0, 2.0, 2.0]
    assert kendall_tau([1, 2, 3]) == 1.0 and kendall_tau([2, 1, 1]) == -1.0
    assert kendall_tau([1, 1]) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"items": 0}, "items"),
        ({"modes": "ar,fast"}, "modes: 'fast' is unknown"),
        ({"modes": ","}, "modes: none given"),
        ({"categories": "poetry"}, "categories: 'poetry' is unknown"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_options_are_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        EvaluateOptions(**values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_group_is_of_one_category_and_categories_take_turns() -> None:
    """Silent failure: a batch of long and short prompts, whose time nobody can divide."""
    groups = draw_groups(["math", "tools"], items=5, seed=0, batch_size=2)
    assert [[document.category for document in group] for group in groups] == [
        ["math"] * 2, ["tools"] * 2, ["math"] * 2, ["tools"] * 2, ["math"], ["tools"],
    ]  # fmt: skip
    single = draw_groups(["math", "tools"], items=5, seed=0, batch_size=1)
    for category in ("math", "tools"):
        drawn = [
            [d.prompt for group in made for d in group if d.category == category]
            for made in (groups, single)
        ]
        assert drawn[0] == drawn[1] and len(set(drawn[0])) == 5


def test_the_sweep_keeps_the_other_options() -> None:
    """Silent failure: points of a sweep that are decoded in blocks of another size."""
    base = GenerateOptions(
        mode="diffusion",
        block_size=8,
        max_new_tokens=40,
        steps_per_block=3,
        confidence_threshold=0.7,
    )
    points = settings(
        Subject(model=tiny_model(), tokenizer=tiny_tokenizer(), options={"diffusion": base})
    )
    assert [(p.confidence_threshold, p.steps_per_block) for p in points] == [
        *[(threshold, 8) for threshold in THRESHOLDS],
        *[(0.7, limit) for limit in PASS_LIMITS if limit < 8],
    ]
    assert {(p.block_size, p.max_new_tokens, p.mode) for p in points} == {(8, 40, "diffusion")}
