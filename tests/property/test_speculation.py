"""Self-speculation is lossless: whatever is drafted, the text is that of mode="ar"."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from property.test_cache import CLOSE, assert_same_rows
from tiny_models import MASK, prompts_of, random_ids, row_state, tiny_model
from tiny_options import options_of
from twotower import (
    ContextView,
    GenerateOptions,
    StepTaken,
    TokensCommitted,
    TwoTower,
    generate,
    stream,
)
from twotower.adapt.answers import Answer
from twotower.adapt.ngrams import count_ngrams
from twotower.engine import EngineOptions, Finished, Request, stream_requests
from twotower.model.backend import PassCosts
from twotower.model.eager import EagerBackend

MODEL = tiny_model()
PROMPTS = prompts_of([1, 7, 2, 19, 4])
FREE = PassCosts(
    {1: 1000.0, 64: 1.0}, row=0.0
)  # passes: no pauses, and every acceptance length comes up


def options(mode: str, **changes: object) -> GenerateOptions:
    return options_of({"max_new_tokens": 17, "block_size": 4}, {"mode": mode} | changes)


class Drafter:
    """In place of the denoiser: AR's own continuation with some tokens wrong."""

    def __init__(self, prompt_length: int, text: list[int], wrong: set[int]) -> None:
        self._start, self._text, self._wrong = prompt_length, text, wrong

    def __call__(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        lengths = torch.full((len(block),), view.num_past) if view.lengths is None else view.lengths
        logits = torch.zeros(*block.shape, 41)
        for row, column in itertools.product(*map(range, block.shape)):
            at = int(lengths[row]) - self._start + column
            token = self._text[at] if at < len(self._text) else 9
            logits[row, column, 10 if at in self._wrong and token != 10 else token] = 20.0
        return logits


@settings(max_examples=40)
@given(
    wrong=st.sets(st.integers(0, 20)),
    block_size=st.integers(2, 4),
    length=st.integers(1, 17),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 30),
)
def test_any_draft_gives_the_text_of_ar(
    wrong: set[int], block_size: int, length: int, temperature: float, seed: int
) -> None:
    """Guards the state after an acceptance of every length: keys beyond it, a conv window or an SSM
    state of the rejected tokens would change the text only later, and only a little."""
    shape = {"max_new_tokens": length, "temperature": temperature, "seed": seed, "top_k": 7}
    prompt = PROMPTS[3]
    expected = generate(MODEL, [prompt], options("ar", **shape))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "pass_costs", FREE)
        patch.setattr(MODEL, "denoise", Drafter(len(prompt), expected.tokens, wrong))
        (found,) = generate(MODEL, [prompt], options("speculative", block_size=block_size, **shape))
    assert found.tokens == expected.tokens
    assert found.finish_reason == expected.finish_reason


@settings(max_examples=30)
@given(
    wrong=st.sets(st.integers(0, 20)),
    rows=st.sampled_from([1, 3]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 30),
)
def test_any_ngram_gives_the_text_of_ar(
    wrong: set[int], rows: int, temperature: float, seed: int
) -> None:
    """Guards drafts out of n-grams, which are longer than a block, against texts that are only
    theirs: AR's own n-grams, some of them wrong.
    """
    shape = {"max_new_tokens": 30, "temperature": temperature, "seed": seed, "top_k": 7}
    prompts = PROMPTS[-rows:]
    expected = [c.tokens for c in generate(MODEL, prompts, options("ar", **shape))]
    texts = [
        (p, [9 if i in wrong else t for i, t in enumerate(own)])
        for p, own in zip(prompts, expected, strict=True)
    ]
    answers = [Answer(number=0, task="", prompt=p, tokens=own) for p, own in texts for _ in "xyz"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODEL, "ngrams", count_ngrams(answers, []))
        patch.setattr(EagerBackend, "pass_costs", FREE)
        found = generate(MODEL, prompts, options("speculative", drafts="lookup", **shape))
    assert [c.tokens for c in found] == expected
    if not wrong:
        assert min(c.lookup_tokens for c in found) > 15


def test_no_draft_goes_beyond_the_end_of_a_text() -> None:
    """Guards the counts of tokens that a text does not have, and passes over them."""
    prompt, shape = PROMPTS[3], {"max_new_tokens": 30}
    (whole,) = generate(MODEL, [prompt], options("ar", **shape))
    answer = Answer(number=0, task="", prompt=prompt, tokens=whole.tokens)
    end = whole.tokens[12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODEL, "ngrams", count_ngrams([answer] * 3, []))
        patch.setattr(EagerBackend, "pass_costs", FREE)
        asked = options("speculative", drafts="lookup", eos_token_id=(end,), **shape)
        (found,) = generate(MODEL, [prompt], asked)
    assert found.tokens == whole.tokens[: whole.tokens.index(end) + 1]
    # The first token and the last are AR's own.
    assert 0 < found.lookup_tokens <= len(found.tokens) - 2


@pytest.mark.filterwarnings("ignore:block_size=30 is larger")
def test_a_long_block_is_verified_at_once() -> None:
    """Guards blocks that are longer than a lookup: what the denoiser wrote is not cut to that."""
    prompt = PROMPTS[3]
    (expected,) = generate(MODEL, [prompt], options("ar", max_new_tokens=30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "pass_costs", FREE)
        patch.setattr(MODEL, "denoise", Drafter(len(prompt), expected.tokens, set()))
        shape = {"max_new_tokens": 30, "block_size": 32, "drafts": "denoiser"}
        (found,) = generate(MODEL, [prompt], options("speculative", **shape))
    assert found.tokens == expected.tokens
    assert (found.nfe, found.context_forwards) == (1, 2)  # the prompt, and all of the draft


PENALTIES = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"logit_bias": {9: 6.0, 10: -100.0}, "frequency_penalty": -0.4},
]


@settings(max_examples=30)
@given(
    wrong=st.sets(st.integers(0, 20)),
    penalties=st.sampled_from(PENALTIES),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 30),
)
def test_any_draft_gives_the_text_of_ar_under_penalties(
    wrong: set[int], penalties: dict[str, object], temperature: float, seed: int
) -> None:
    """Guards the history of a place inside a block: penalties that miss the drafted tokens before
    it, or count those behind it, give another text than AR's, and only where drafts are right.
    """
    shape = {"temperature": temperature, "seed": seed, "min_p": 0.01, **penalties}
    prompt = PROMPTS[3]
    expected = generate(MODEL, [prompt], options("ar", **shape))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "pass_costs", FREE)
        patch.setattr(MODEL, "denoise", Drafter(len(prompt), expected.tokens, wrong))
        (found,) = generate(MODEL, [prompt], options("speculative", **shape))
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_rows_with_and_without_penalties_share_passes(penalties: dict[str, object]) -> None:
    """Guards neighbours: a row's penalties must change its own text and no other."""
    alone = [
        generate(MODEL, [p], options("ar", **o))[0].tokens for p in PROMPTS for o in ({}, penalties)
    ]
    assert alone[::2] != alone[1::2]
    requests = [Request(p, options("speculative", **o)) for p in PROMPTS for o in ({}, penalties)]
    events = stream_requests(MODEL, requests, None, EngineOptions(batch_size=10))
    ended = {e.row: e.completion.tokens for e in events if isinstance(e, Finished)}
    assert [ended[row] for row in range(len(alone))] == alone


def test_right_drafts_save_passes() -> None:
    """Guards the gain: a draft that is right must be taken whole, not token by token."""
    prompt = PROMPTS[3]
    expected = generate(MODEL, [prompt], options("ar"))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODEL, "denoise", Drafter(len(prompt), expected.tokens, set()))
        (found,) = generate(MODEL, [prompt], options("speculative", drafts="denoiser"))
    assert found.tokens == expected.tokens
    # the prompt gives 1 token, four cycles 4 each
    assert (found.nfe, found.context_forwards, expected.context_forwards) == (4, 5, 17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODEL, "denoise", Drafter(len(prompt), expected.tokens, set()))
        o = options("speculative", drafts="denoiser", max_new_tokens=18)
        (longer,) = generate(MODEL, [prompt], o)
    assert (longer.nfe, longer.context_forwards) == (4, 6), "the last token alone needs no draft"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft_passes", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hybrid_override_pattern": "MM"},
        {"hybrid_override_pattern": "**"},
        {"use_bias": True, "mamba_proj_bias": True},
        {"residual_in_fp32": True},
    ],
    ids=str,
)
def test_rows_of_different_lengths_give_the_text_of_ar(
    changes: dict[str, object], draft_passes: int, temperature: float
) -> None:
    """Guards rows that advance by different lengths in one batch, with the real denoiser."""
    model = tiny_model(**changes)
    shape = {"temperature": temperature, "seed": 3}
    expected = generate(model, PROMPTS, options("ar", **shape))
    found = generate(model, PROMPTS, options("speculative", **shape, draft_passes=draft_passes))
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_eos_stop_and_length_end_a_row_as_in_ar() -> None:
    """Guards the end: tokens accepted behind an EOS must not be shown."""
    text = generate(MODEL, [PROMPTS[0]], options("ar"))[0].tokens
    for eos in text[:9]:
        expected = generate(MODEL, [PROMPTS[0]], options("ar", eos_token_id=eos))[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODEL, "denoise", Drafter(1, text, set()))
            (found,) = generate(MODEL, [PROMPTS[0]], options("speculative", eos_token_id=eos))
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)


def test_the_events_show_drafts_without_the_known_token() -> None:
    """Guards what a reader of the stream sees: the first token of a block is text already."""
    events = list(stream(MODEL, [PROMPTS[0]], options("speculative")))
    steps = [event for event in events if isinstance(event, StepTaken)]
    assert steps and all(len(step.tokens) == 3 and MASK not in step.tokens for step in steps)
    assert all(step.t == 0.75 for step in steps)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    size=st.integers(1, 6),
    seed=st.integers(0, 20),
)
def test_accepting_some_equals_extending_by_them(lengths: list[int], size: int, seed: int) -> None:
    """Guards the rebuilt states, and that reading alone leaves the cache bit for bit as it was."""
    num_rows, longest = len(lengths), max(lengths)
    ids = random_ids(num_rows, longest + size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, size + 1, (num_rows,), generator=generator)
    cache = MODEL.prefill(ids[:, :longest], torch.tensor(lengths))
    new = ids[:, longest:]
    before = [part.clone() for row in range(num_rows) for part in row_state(cache, row)]
    output = MODEL.verify(cache, new)
    after = [part for row in range(num_rows) for part in row_state(cache, row)]
    assert all(map(torch.equal, after, before))
    cache.commit(output, counts)
    expected = MODEL.prefill(ids[:, :longest], torch.tensor(lengths))
    MODEL.extend(expected, new, counts)
    assert cache.lengths.tolist() == expected.lengths.tolist()
    for row in range(num_rows):
        assert_same_rows(cache, row, expected, row)
    torch.testing.assert_close(MODEL.next_logits(cache), MODEL.next_logits(expected), **CLOSE)


def test_sampled_texts_have_the_distribution_of_ar() -> None:
    """Guards the acceptance rule against a bias that one seed does not show: the third token's
    frequencies against its exact probabilities, summed over all texts that lead to it."""
    model = tiny_model(vocab_size=7)
    prompt, num_draws = [5, 4, 6], 1500
    shape = {"max_new_tokens": 3, "temperature": 1.3}
    o = [options("speculative", seed=seed, **shape) for seed in range(num_draws)]
    rows = [row for start in range(0, num_draws, 250) for row in _draw(model, prompt, o, start)]
    counts = torch.bincount(torch.tensor([row[2] for row in rows]), minlength=7).double()
    expected = num_draws * _third_token(model, prompt, 1.3)
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < 22.5, "chi-square of 6 degrees of freedom exceeds this once in 1,000 draws"


def _draw(
    model: TwoTower, prompt: list[int], o: list[GenerateOptions], start: int
) -> list[list[int]]:
    own = o[start : start + 250]
    return [row.tokens for row in generate(model, [prompt] * len(own), own)]


def _third_token(model: TwoTower, prompt: list[int], temperature: float) -> Tensor:
    """Exact probabilities of the third new token (V,)."""
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    ids = torch.cat([torch.tensor([prompt]).expand(len(pairs), -1), pairs], dim=1)
    with torch.no_grad():
        probs = (model.context_logits(ids).double() / temperature).softmax(-1)
    first = probs[torch.arange(49), len(prompt) - 1, pairs[:, 0]]
    second = probs[torch.arange(49), len(prompt), pairs[:, 1]]
    return (probs[:, -1] * (first * second).unsqueeze(1)).sum(0)


def half_of(model: TwoTower) -> TwoTower:
    """The context tower of a model alone."""
    half = TwoTower(model.config, towers="context").eval()
    own = {n: v for n, v in model.state_dict().items() if n.startswith("context_")}
    half.load_state_dict(own)
    return half


# What these write repeats itself, so that lookup finds its drafts.
LOOPING = tiny_model(vocab_size=6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("drafts", ["auto", "lookup"])
def test_lookup_gives_the_texts_of_ar(drafts: str, temperature: float) -> None:
    """Guards drafts of the text itself: in batches whose rows have drafts of either kind or none,
    with a denoiser and without, sampled and greedy."""
    shape = {"max_new_tokens": 60, "temperature": temperature, "seed": 5, "ignore_eos": True}
    prompts = [[4, 5], [4], [5, 4, 5, 4, 5], [4, 5, 5, 5, 4, 4, 5]]
    expected = generate(LOOPING, prompts, options("ar", **shape))
    for model in (LOOPING, half_of(LOOPING)):
        found = generate(model, prompts, options("speculative", drafts=drafts, **shape))
        assert [row.tokens for row in found] == [row.tokens for row in expected]
        assert sum(row.lookup_tokens for row in found) > 10, "the test tests nothing"
        assert sum(row.denoiser_tokens for row in found) == 0 or drafts == "auto"
        for row, plain in zip(found, expected, strict=True):
            accepted = row.lookup_tokens + row.denoiser_tokens
            assert row.context_forwards == plain.context_forwards - accepted


def test_a_model_without_a_denoiser_looks_up_by_default() -> None:
    """Guards the speed of a backbone, which would decode token by token in silence."""
    half = half_of(LOOPING)
    shape = {"max_new_tokens": 40, "ignore_eos": True}
    (found,) = generate(half, [[4, 5]], GenerateOptions(**shape))  # type: ignore[arg-type]
    assert found.lookup_tokens > 0 and found.nfe == 0
    with pytest.raises(ValueError, match="drafts='denoiser' needs a denoiser tower"):
        generate(half, [[4, 5]], GenerateOptions(mode="speculative", drafts="denoiser"))
    with pytest.raises(ValueError, match="draft_passes=2: has no effect on drafts='lookup'"):
        generate(half, [[4, 5]], GenerateOptions(draft_passes=2))


def test_the_events_name_the_drafter() -> None:
    """Guards the record of who wrote what was accepted."""
    shape = {"max_new_tokens": 60, "ignore_eos": True}
    events = list(stream(LOOPING, [[4, 5]], options("speculative", drafts="lookup", **shape)))
    commits = [event for event in events if isinstance(event, TokensCommitted)]
    assert {event.drafter for event in commits if event.drafted} == {"lookup"}
    assert all(event.drafter is None for event in commits if not event.drafted)
    assert not any(isinstance(event, StepTaken) for event in events)


def test_a_denoiser_is_tried_before_lookups() -> None:
    """Guards texts that repeat themselves: lookups that give two tokens a cycle would be kept for
    ever, and a denoiser that gives ten would never be asked."""
    shape = {"max_new_tokens": 12, "ignore_eos": True}
    prompt = [4, 5] * 8
    events = stream(LOOPING, [prompt], options("speculative", drafts="auto", **shape))
    drafters = [e.drafter for e in events if isinstance(e, TokensCommitted) and e.drafted]
    assert drafters[0] == "denoiser"
