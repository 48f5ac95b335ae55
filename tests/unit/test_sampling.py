import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny_sampler import RowSampler, sampler_of
from twotower.diffusion import Sampler
from twotower.diffusion.chance import draw_noise, filter_logits, gumbel
from twotower.diffusion.sampling import choose
from twotower.diffusion.scheduled import uniform


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def log_of(*probs: float) -> Tensor:
    return torch.tensor([probs]).log()


def params(num_rows: int = 1, **values: float | int) -> Sampler:
    """A sampler of rows that are alike."""
    return sampler_of(RowSampler(**values), num_rows)  # type: ignore[arg-type]


def support(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (1, 1.0, [2]),
        (2, 1.0, [1, 2]),
        (99, 1.0, [0, 1, 2, 3]),
        (0, 0.39, [2]),
        (0, 0.41, [1, 2]),
        (0, 0.71, [0, 1, 2]),
        (0, 1e-6, [2]),
        (2, 0.56, [2]),  # 0.4 / 0.7 = 0.571 of what top-k left
        (2, 0.58, [1, 2]),
    ],
)
def test_support(top_k: int, top_p: float, expected: list[int]) -> None:
    """Guards the order (top-k, then top-p of the rest) and both edges of each cut."""
    filtered = filter_logits(
        log_of(0.2, 0.3, 0.4, 0.1), params(temperature=1.0, top_k=top_k, top_p=top_p)
    )
    assert support(filtered) == [expected]
    kept = torch.tensor([0.2, 0.3, 0.4, 0.1])[expected]
    torch.testing.assert_close(filtered.softmax(-1)[0, expected], kept / kept.sum())


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"min_p": 0.49}, [0, 1, 2]),  # at least 0.196
        ({"min_p": 0.51}, [1, 2]),
        ({"min_p": 1.0}, [2]),
        ({"min_p": 0.3, "temperature": 0.5}, [1, 2]),  # of the squares: 0.16, 0.09, 0.04
        ({"min_p": 0.51, "top_p": 0.56}, [2]),  # 0.4 / 0.7 of what min-p left
    ],
)
def test_min_p_is_a_share_of_the_largest(cut: dict[str, float], expected: list[int]) -> None:
    """Guards its place: after temperature and before the other filters."""
    shape = {"temperature": 1.0, **cut}
    filtered = filter_logits(log_of(0.2, 0.3, 0.4, 0.1), params(**shape))
    assert support(filtered) == [expected]


def test_top_k_keeps_exactly_k_of_equal_logits() -> None:
    """Guards against quantised logits: a cut by value would keep every tie."""
    assert support(filter_logits(torch.zeros(1, 6), params(top_k=2))) == [[0, 1]]
    assert support(filter_logits(torch.zeros(1, 5000), params(top_k=3))) == [[0, 1, 2]]


def test_temperature_comes_before_top_p() -> None:
    # at temperature 0.5 the probabilities are squared: 0.16 / 0.30 = 0.53 of the mass
    assert support(
        filter_logits(log_of(0.2, 0.3, 0.4, 0.1), params(temperature=0.5, top_p=0.5))
    ) == [[2]]


def test_rows_have_their_own_parameters() -> None:
    logits = log_of(0.2, 0.3, 0.4, 0.1).expand(3, 4)
    rows = [
        RowSampler(temperature=1.0, top_k=1),
        RowSampler(temperature=0.5),
        RowSampler(temperature=2.0, top_p=0.6),
    ]
    filtered = filter_logits(logits, sampler_of(rows))
    assert support(filtered) == [[2], [0, 1, 2, 3], [1, 2]]
    torch.testing.assert_close(filtered[1].softmax(-1), (2 * logits[1]).softmax(-1))


def test_tiny_temperature_is_finite() -> None:
    filtered = filter_logits(torch.tensor([[900.0, -900.0, 899.0]]), params(temperature=1e-38))
    assert filtered.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_sampled_frequencies(shape: tuple[int, ...]) -> None:
    """Guards the distribution: scaling the noise, or adding it to probabilities, skews it."""
    probs = torch.tensor([0.05, 0.5, 0.3, 0.15, 0.0])
    logits = probs.log().expand(*shape, 5)
    sampler = params(4, temperature=0.7, top_k=3)
    generators = seeded(*range(4))
    counts = torch.zeros(5)
    for _ in range(4000):
        noise = draw_noise(logits, sampler, generators)
        counts += choose(logits, sampler, noise).flatten().bincount(minlength=5)
    kept = torch.tensor([0, 0.5, 0.3, 0.15, 0]) ** (1 / 0.7)
    assert counts[0] == counts[4] == 0
    torch.testing.assert_close(counts / counts.sum(), kept / kept.sum(), rtol=0, atol=0.012)


def test_gumbel_moments() -> None:
    noise = gumbel((50_000,), seeded(0, 1))
    assert noise.shape == (2, 50_000) and bool(noise.isfinite().all())
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
    assert not torch.equal(noise[0], noise[1])


@given(
    temperatures=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1, max_size=4),
    seed=st.integers(0, 10),
)
def test_a_row_chooses_the_same_alone_and_in_a_batch(temperatures: list[float], seed: int) -> None:
    """Guards requests served together: a neighbour's draw or parameters must not leak in."""
    num_rows = len(temperatures)
    logits = torch.randn(num_rows, 3, 11, generator=seeded(seed)[0])
    sampler = sampler_of([RowSampler(temperature=t, top_k=k) for k, t in enumerate(temperatures)])
    together = choose(logits, sampler, draw_noise(logits, sampler, seeded(*range(num_rows))))
    for row in range(num_rows):
        alone = sampler.select(torch.tensor([row]))
        one = logits[row : row + 1]
        assert torch.equal(
            choose(one, alone, draw_noise(one, alone, seeded(row)))[0], together[row]
        )
        if temperatures[row] == 0:
            assert torch.equal(together[row], logits[row].argmax(-1))


MIXED = sampler_of([RowSampler(), RowSampler(temperature=1.0)])


def test_greedy_rows_draw_nothing() -> None:
    generators = seeded(0, 1)
    before = [generator.get_state() for generator in generators]
    assert draw_noise(torch.zeros(2, 5), params(2), generators) is None
    noise = draw_noise(torch.zeros(2, 5), MIXED, generators)
    assert noise is not None and bool((noise[0] == 0).all()) and bool((noise[1] != 0).all())
    assert torch.equal(generators[0].get_state(), before[0])
    assert not torch.equal(generators[1].get_state(), before[1])


def test_greedy_rows_ignore_noise() -> None:
    logits = torch.randn(2, 500, 9)
    noise = gumbel((500, 9), seeded(0, 1))
    tokens = choose(logits, MIXED, noise)
    is_greedy = tokens == logits.argmax(-1)
    assert is_greedy[0].all() and not is_greedy[1].all()


def test_uniform_is_per_row() -> None:
    both = uniform((4,), seeded(0, 1))
    assert torch.equal(both[1:], uniform((4,), seeded(1)))
    assert bool(((both >= 0) & (both < 1)).all())


def test_sampling_without_noise() -> None:
    with pytest.raises(AssertionError, match="needs noise"):
        choose(torch.zeros(1, 5), params(temperature=1.0))
