"""What generate and stream promise for every mode: rows alone, tokens that stay, honest counts."""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import MASK, fresh_model, prompts_of, tiny_model
from tiny_options import options_of
from tiny_text import tiny_tokenizer
from twotower import (
    Completion,
    Event,
    Finished,
    GenerateOptions,
    StepTaken,
    TokensCommitted,
    generate,
    stream,
)
from twotower.engine import MODES

MODEL = tiny_model()
LENGTHS = [1, 7, 2, 19, 4]
PROMPTS = prompts_of(LENGTHS)
BLOCK_MODES = ("diffusion", "posterior", "predict-and-noise")


def options(**changes: object) -> GenerateOptions:
    """Blocks of 4 tokens in 4 steps, a length that is not a multiple of the block."""
    return options_of({"max_new_tokens": 11, "block_size": 4, "steps_per_block": 4}, changes)


VARIANTS = [
    *({"mode": mode} for mode in MODES),
    {"mode": "posterior", "schedule": "cosine", "steps_per_block": 7},
    {"mode": "predict-and-noise", "schedule": "exponential", "remask": "margin"},
    {"mode": "predict-and-noise", "remask": "random", "adaptive": True},
    {"mode": "diffusion", "confidence_threshold": 0.1, "block_size": 3},
    {"mode": "diffusion", "first_token": "context"},
    {"mode": "diffusion", "first_token": "context", "verify_threshold": 0.011},
]
every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values()))
)


@every_variant
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_gives_the_same_tokens_alone_batched_and_permuted(
    variant: dict[str, object], temperature: float
) -> None:
    """Guards independence of rows: shared randomness, padding or t make a served answer depend on
    who else was asking."""
    o = [
        options(**variant, temperature=temperature, top_k=20, top_p=0.95, seed=seed)
        for seed in range(len(PROMPTS))
    ]
    together = generate(MODEL, PROMPTS, o)
    alone = [generate(MODEL, [p], own)[0] for p, own in zip(PROMPTS, o, strict=True)]
    assert together == alone
    order = [3, 0, 4, 2, 1]
    permuted = generate(MODEL, [PROMPTS[i] for i in order], [o[i] for i in order])
    assert permuted == [together[i] for i in order]


def test_rows_of_one_call_may_differ_in_every_option() -> None:
    """Guards the grouping of rows: each keeps its mode, length, steps, temperature and seed."""
    o = [
        options(mode="ar", max_new_tokens=3),
        options(mode="diffusion", temperature=0.7, seed=5, max_new_tokens=9, steps_per_block=2),
        options(mode="diffusion", confidence_threshold=0.2, block_size=2),
        options(mode="mock-ar", max_new_tokens=5, temperature=1.0, top_k=3),
        options(mode="posterior", schedule="cosine"),
        options(first_token="context", verify_threshold=0.02),
    ]
    prompts = [*PROMPTS, PROMPTS[1]]
    together = generate(MODEL, prompts, o)
    assert together == [generate(MODEL, [p], own)[0] for p, own in zip(prompts, o, strict=True)]
    assert [len(row.tokens) for row in together] == [3, 9, 11, 5, 11, 11]


@every_variant
def test_a_seed_decides_a_sampled_text(variant: dict[str, object]) -> None:
    """Guards reproducibility: the global generator must not matter, the row's seed must."""
    o = options(**variant, temperature=1.0, seed=1)
    torch.manual_seed(1)
    first = generate(MODEL, PROMPTS, o)
    torch.manual_seed(2)
    assert generate(MODEL, PROMPTS, o) == first
    other = generate(MODEL, PROMPTS, dataclasses.replace(o, seed=2))
    assert [row.tokens for row in other] != [row.tokens for row in first]


def test_temperature_zero_ignores_the_seed() -> None:
    first = generate(MODEL, PROMPTS, options(seed=1))
    assert generate(MODEL, PROMPTS, options(seed=2)) == first


@pytest.mark.parametrize("mode", MODES)
def test_top_k_of_one_is_greedy(mode: str) -> None:
    """Guards the filters: at any temperature the only token left is the most probable one."""
    if mode == "posterior":
        return  # it draws whether to commit, too
    sure = {"confidence_threshold": 1.0} if mode in ("diffusion", "speculative") else {}
    greedy = generate(MODEL, PROMPTS[:2], options(mode=mode, **sure))
    o = options(mode=mode, **sure, temperature=3.0, top_k=1)
    assert generate(MODEL, PROMPTS[:2], o) == greedy


@settings(max_examples=12)
@given(
    mode=st.sampled_from(BLOCK_MODES),
    block_size=st.integers(1, 4),
    steps=st.integers(1, 6),
    length=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_steps_only_fill_blocks(
    mode: str, block_size: int, steps: int, length: int, temperature: float, seed: int
) -> None:
    """Guards what a streamed view shows: a committed token stays, every pass is counted once, no
    block takes more than its steps, and the text is the blocks in order, cut to the length."""
    o = options(
        mode=mode,
        block_size=block_size,
        steps_per_block=steps,
        max_new_tokens=length,
        temperature=temperature,
        seed=seed,
    )
    events = list(stream(MODEL, PROMPTS[:3], o))
    for row in range(3):
        own = [event for event in events if event.row == row]
        completion = finished(own)
        blocks: dict[int, list[StepTaken]] = {}
        for event in own:
            if isinstance(event, StepTaken):
                blocks.setdefault(event.block_index, []).append(event)
        assert list(blocks) == list(range(-(-length // block_size)))
        for taken in blocks.values():
            check_block(taken, block_size, steps)
        text = [token for taken in blocks.values() for token in taken[-1].tokens]
        assert completion.tokens == text[:length]
        check_counts(blocks, completion.nfe, reuses=mode == "posterior")
        assert completion.context_forwards == len(blocks), "the prefill, no extension at the end"


def check_block(steps: list[StepTaken], block_size: int, most: int) -> None:
    """One block from all masked to all committed."""
    before = [MASK] * block_size
    assert len(steps) <= most
    assert 0 < steps[0].t <= 1
    for step in steps:
        assert len(step.tokens) == len(step.is_masked) == len(step.confidence) == block_size
        assert step.is_masked == [token == MASK for token in step.tokens]
        assert all(0 <= value <= 1 + 1e-6 for value in step.confidence)
        for old, new in zip(before, step.tokens, strict=True):
            assert old in (MASK, new), "a committed token changed"
        before = step.tokens
    assert MASK not in before


def check_counts(blocks: dict[int, list[StepTaken]], nfe: int, reuses: bool) -> None:
    """A pass is counted once per step, or not at all where an unchanged row reuses its last."""
    counts = [0, *(step.nfe for taken in blocks.values() for step in taken)]
    added = [new - old for old, new in itertools.pairwise(counts)]
    assert set(added) <= ({0, 1} if reuses else {1})
    assert counts[-1] == nfe
    before = 0
    for taken in blocks.values():
        assert taken[0].nfe == before + 1, "a new block needs a new pass"
        before = taken[-1].nfe


def finished(events: Sequence[Event]) -> Completion:
    """The one completion among a row's events, which is the last of them."""
    *others, last = events
    assert isinstance(last, Finished)
    assert not any(isinstance(event, Finished) for event in others)
    return last.completion


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [None, "b"])
def test_events_agree_with_the_completion(mode: str, stop: str | None) -> None:
    """Guards streaming: what was shown piece by piece is the final answer, no more."""
    tokenizer = tiny_tokenizer()
    o = options(mode=mode, max_new_tokens=18, stop=stop, temperature=1.0, eos_token_id=(7, 8))
    for seed in range(3):
        o = dataclasses.replace(o, seed=seed)
        events = list(stream(MODEL, PROMPTS[:3], o, tokenizer))
        for row in range(3):
            own = [event for event in events if event.row == row]
            completion = finished(own)
            commits = [event for event in own if isinstance(event, TokensCommitted)]
            assert [c.block_index for c in commits] == list(range(len(commits)))
            assert [t for c in commits for t in c.tokens] == completion.tokens
            assert "".join(c.text for c in commits) == completion.text
            assert commits[-1].nfe == completion.nfe
            assert commits[-1].context_forwards == completion.context_forwards
            assert stop is None or stop not in str(completion.text)
            if completion.finish_reason == "length":
                assert len(completion.tokens) == 18
            if completion.finish_reason == "eos":
                assert completion.tokens[-1] in (7, 8)
            assert not {7, 8} & set(completion.tokens[:-1])


@pytest.mark.parametrize("mode", ["ar", "mock-ar"])
def test_token_by_token_counts(mode: str) -> None:
    """Guards the compared figures: AR has no denoiser pass and one context pass per token."""
    (row,) = generate(MODEL, PROMPTS[1:2], options(mode=mode, max_new_tokens=6))
    assert row.nfe == (0 if mode == "ar" else 6)
    assert row.context_forwards == 6
    # a prompt of one token: mock-AR keeps it out of the cache, so there is nothing to prefill
    (row,) = generate(MODEL, [[5]], options(mode=mode, max_new_tokens=6))
    assert row.context_forwards == (6 if mode == "ar" else 5)


def test_ar_follows_the_context_head() -> None:
    """Guards AR decoding against its own definition, without any cache."""
    (row,) = generate(MODEL, [PROMPTS[1]], options(mode="ar"))
    text = list(PROMPTS[1])
    for token in row.tokens:
        with torch.no_grad():
            logits = MODEL.context_logits(torch.tensor([text]))[0, -1]
        assert token == int(logits.argmax())
        text.append(token)


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_longer_texts_begin_with_the_shorter(mode: str) -> None:
    """Guards the cut of the last block: the length must not change what comes before it."""
    (longest,) = generate(MODEL, [PROMPTS[1]], options(mode=mode, max_new_tokens=12))
    for length in (1, 3, 4, 5, 9):
        (row,) = generate(MODEL, [PROMPTS[1]], options(mode=mode, max_new_tokens=length))
        assert row.tokens == longest.tokens[:length]
        assert row.finish_reason == "length"


def test_finished_rows_leave_and_others_go_on() -> None:
    """Guards per-row EOS: the official code ends the whole batch with its first EOS."""
    o = options(max_new_tokens=24, temperature=1.0)
    free = generate(MODEL, PROMPTS, o)
    tokens = free[1].tokens
    inside = [i for i, x in enumerate(tokens) if i % 4 < 3 and i > 3 and x not in tokens[:i]]
    eos = tokens[inside[0]]  # in the middle of a later block
    with_eos = generate(MODEL, PROMPTS, dataclasses.replace(o, eos_token_id=eos))
    for row, whole in zip(with_eos, free, strict=True):
        end = whole.tokens.index(eos) + 1 if eos in whole.tokens else 24
        assert row.tokens == whole.tokens[:end]
        assert row.finish_reason == ("eos" if eos in whole.tokens else "length")
    assert with_eos[1].nfe < free[1].nfe, "an ended row costs no more passes"
    assert len({len(row.tokens) for row in with_eos}) > 1, "rows end at different places"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_context_tower_can_choose_first_tokens(temperature: float) -> None:
    """Guards first_token="context": each block begins with what AR decoding would write there, and
    the first pass is told that 3 of 4 positions are masked. A token chosen from the state of the
    block before, or drawn with another row's randomness, would still look like text."""
    together = [
        options(first_token="context", temperature=temperature, seed=seed)
        for seed in range(len(PROMPTS))
    ]
    events = list(stream(MODEL, PROMPTS, together))
    for row, prompt in enumerate(PROMPTS):
        blocks = [e.tokens for e in events if isinstance(e, TokensCommitted) and e.row == row]
        steps = [e for e in events if isinstance(e, StepTaken) and e.row == row]
        assert {e.t for e in steps if e.step == 0} == {0.75}
        text = list(prompt)
        for index, block in enumerate(blocks):
            if temperature == 0 or index == 0:  # later draws follow the block's own
                ar = options(mode="ar", max_new_tokens=1, temperature=temperature, seed=row)
                assert block[:1] == generate(MODEL, [text], ar)[0].tokens
            text += block


def test_a_first_token_that_is_the_whole_block_is_the_denoisers() -> None:
    """Guards blocks of one token: with nothing left to fill there would be no pass and no step."""
    o = options(first_token="context", block_size=1)
    assert generate(MODEL, PROMPTS[:1], o) == generate(MODEL, PROMPTS[:1], options(block_size=1))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("threshold", [0.005, 0.011, 0.02, 0.04, 0.1])
def test_verification_rejects_what_the_context_tower_finds_improbable(
    temperature: float, threshold: float
) -> None:
    """Guards verify_threshold: of every filled block the tokens up to the first improbable one
    stand, no fewer and no more. Probabilities that belong to the next place, or a cache that still
    holds what was rejected, would only make the text a little worse."""
    together = [
        options(
            first_token="context", verify_threshold=threshold, temperature=temperature, seed=seed
        )
        for seed in range(len(PROMPTS))
    ]
    events = list(stream(MODEL, PROMPTS, together))
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        mine = [e for e in events if not isinstance(e, Finished) and e.row == row]
        for event, follower in zip(mine, [*mine[1:], None], strict=True):
            if isinstance(event, StepTaken) and isinstance(follower, TokensCommitted):
                chances = chances_after(text, event.tokens)
                good = [chance >= threshold for chance in chances[1:]] + [False]
                expected = event.tokens[: 1 + good.index(False)]
                assert follower.tokens == expected[: 11 - (len(text) - len(prompt))]
                behind = len(event.tokens) - len(expected)
                assert follower.rejected == (0 if follower is mine[-1] else behind)
                text += follower.tokens


def chances_after(text: list[int], block: list[int]) -> list[float]:
    """The context tower's probability of each token of a block, all read anew."""
    cache = MODEL.prefill(torch.tensor([text]))
    first = MODEL.next_logits(cache).unsqueeze(1)
    rest = MODEL.context_head(MODEL.extend(cache, torch.tensor([block]))[:, :-1])
    chances = torch.cat([first, rest], dim=1)[0].softmax(-1)
    return chances[torch.arange(len(block)), block].tolist()


def test_verification_that_nothing_passes_is_ar() -> None:
    """Guards the replacement: where every drafted token is rejected, the context tower's own
    follow one another, so the text is AR's and each block costs one verification."""
    strict = generate(MODEL, PROMPTS, options(first_token="context", verify_threshold=1.0))
    ar = generate(MODEL, PROMPTS, options(mode="ar"))
    assert [row.tokens for row in strict] == [row.tokens for row in ar]
    assert [row.context_forwards for row in strict] == [1 + 11] * len(PROMPTS)


@pytest.mark.parametrize("mode", ["posterior", "predict-and-noise"])
def test_only_diffusion_is_opened_and_verified_by_the_context_tower(mode: str) -> None:
    """Guards the other block samplers: a checkpoint's defaults for diffusion are not theirs."""
    plain = generate(MODEL, PROMPTS, options(mode=mode))
    model = fresh_model()
    model.generation_defaults = {"first_token": "context", "verify_threshold": 0.5}
    assert generate(model, PROMPTS, options(mode=mode)) == plain
