"""Passes of fixed shapes, as they run on a GPU: recorded by a stand-in that traces and replays."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import recorded
from recorded import Case
from replayed import Replayed, recording
from tiny_models import (
    MASK,
    masked_like,
    prompts_of,
    random_ids,
    random_model,
    row_state,
    tiny_model,
)
from tiny_options import options_of
from tiny_sampler import RowSampler, sampler_of
from twotower import ContextCache, TwoTower, accelerate, generate
from twotower.checkpoint.denoiser import with_new_denoiser
from twotower.config import DraftSpec
from twotower.engine.choosing import ChoosingBackend
from twotower.families import config_from_dict
from twotower.graphs import arena, backend
from twotower.graphs.passes import count_accepted
from twotower.kernels import expert_products
from twotower.model.eager import EagerBackend
from twotower.model.precision import rounded_to_eight_bits
from twotower.model.rows import append_rows, keep_rows, select_rows
from twotower.model.state import ForwardOutput
from twotower.model.thin import thin_config
from twotower.model.view import LayerState

# float32 sums in another order, through 6 layers
CLOSE = {"rtol": 0.0, "atol": 2e-4}
LLAMA: dict[str, object] = {
    "model_type": "qwen3", "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "block_size": 4, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
    "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
}  # fmt: skip


def llama_with_thin_denoiser() -> TwoTower:
    """Rotary positions, and a denoiser that reads the hidden state, with a bigram term."""
    model = random_model(config_from_dict(LLAMA))
    spec = DraftSpec(vocab_size=20, reads_hidden=True, bigram_rank=4)
    config = thin_config(model.config, (2, 3), 4, spec)
    return with_new_denoiser(model, config, torch.arange(3, 23), 0)


MODELS = {
    "Mamba first": lambda: tiny_model(),
    "attention first": lambda: tiny_model(hybrid_override_pattern="*EM-"),
    "Mamba alone": lambda: tiny_model(hybrid_override_pattern="M-M"),
    "no state": lambda: tiny_model(hybrid_override_pattern="-E"),
    "bidirectional": lambda: tiny_model(bidirectional_mamba=True),
    "thin": llama_with_thin_denoiser,
}

RECORDED = ("Mamba first", "thin", "bidirectional")


class Pair(NamedTuple):
    """Recorded and eager."""

    ours: TwoTower
    eager: TwoTower


def after(model: TwoTower, cache: ContextCache, drafts: Tensor) -> tuple[Tensor, ForwardOutput]:
    """What greedy AR decoding would write after each token of drafts (B, n)."""
    output = model.verify(cache, drafts)
    return model.context_head(output.hidden).argmax(-1), output


class Text:
    """One cache in both models, and what may happen to it."""

    def __init__(self, pair: Pair, caches: Sequence[ContextCache]) -> None:
        self.pair, self.caches = pair, caches

    def both(self, call: Callable[[TwoTower, ContextCache], Tensor]) -> None:
        one, two = (call(m, c) for m, c in zip(self.pair, self.caches, strict=True))
        torch.testing.assert_close(one, two, **CLOSE)

    @property
    def num_rows(self) -> int:
        return self.caches[0].num_rows

    def extend(self, draw: random.Random) -> None:
        ids = random_ids(self.num_rows, draw.choice([1, 1, 3, 8]), seed=draw.randrange(99))
        counts = torch.tensor([draw.randint(0, ids.shape[1]) for _ in range(self.num_rows)])
        given = draw.choice([None, counts])
        ends = counts if given is not None else torch.full_like(counts, ids.shape[1])
        seen = torch.arange(ids.shape[1]) < ends.unsqueeze(1)
        self.both(lambda m, c: m.extend(c, ids, given)[seen])

    def verify(self, draw: random.Random) -> None:
        """A draft of which some is kept, or none is; it may be another backend's pass."""
        ids = random_ids(self.num_rows, draw.choice([2, 4, 5]), seed=draw.randrange(99))
        counts = torch.tensor([draw.randint(0, ids.shape[1]) for _ in range(self.num_rows)])
        between, keeps, is_eager = (draw.random() < share for share in (0.5, 0.7, 0.3))

        def work(model: TwoTower, cache: ContextCache) -> Tensor:
            if between:
                model.verify(cache, ids.flip(1))
            output = (self.pair.eager if is_eager else model).verify(cache, ids)
            if keeps:
                cache.commit(output, counts)
            return output.hidden

        self.both(work)

    def decode(self, draw: random.Random) -> None:
        """Drafts that are right up to somewhere, or some AR steps."""
        size, num_steps = draw.choice([(1, 1), (1, 3), (2, 1), (5, 1)])
        drafts = random_ids(self.num_rows, size, seed=draw.randrange(99))
        for place in range(draw.randrange(size)):  # what AR would write
            drafts[:, place + 1] = after(self.pair.eager, self.caches[1], drafts)[0][:, place]
        lengths = torch.tensor([draw.randint(1, size) for _ in range(self.num_rows)])
        chooser = self.pair.ours.backend
        assert isinstance(chooser, ChoosingBackend)
        sampler = sampler_of(RowSampler(), self.num_rows)
        choices, counts = chooser.decode(self.caches[0], drafts, lengths, sampler, None, num_steps)
        stay = torch.arange(choices.shape[1]) < counts.unsqueeze(1)
        written, given = list[Tensor](), drafts
        for _ in range(num_steps):
            expected, output = after(self.pair.eager, self.caches[1], given)
            kept = count_accepted(given, expected, lengths)
            self.caches[1].commit(output, kept)
            written, given = [*written, expected], expected[:, :1]
        assert torch.equal(torch.cat(written, 1)[stay], choices[stay])
        assert torch.equal(counts, kept if num_steps == 1 else kept * num_steps)

    def lose_a_row(self, draw: random.Random) -> None:
        if self.num_rows > 1:
            stay = draw.sample(range(self.num_rows), self.num_rows - 1)
            for cache in self.caches:
                keep_rows(cache, stay)

    def gain_a_row(self, draw: random.Random) -> None:
        """Its text is as long as the first one's, which may be what a row had that has left."""
        length, seed = int(self.caches[0].lengths[0]), draw.randrange(99)
        for model, cache in zip(self.pair, self.caches, strict=True):
            ids = random_ids(1, max(1, length), seed=seed)
            append_rows(cache, model.prefill(ids) if length else model.empty_cache(1))

    def denoise(self, draw: random.Random) -> None:
        """Two passes over a block, of all rows or of some."""
        if self.pair.eager.config.draft is not None and self.caches[0].last_hidden is None:
            return
        rows = torch.tensor(
            sorted(draw.sample(range(self.num_rows), draw.randint(1, self.num_rows)))
        )
        block = masked_like(random_ids(len(rows), 4, seed=draw.randrange(99)))
        block = block.masked_fill(block == MASK, self.pair.eager.config.mask_token_id)
        t = draw.choice([None, torch.rand(len(rows), generator=torch.Generator().manual_seed(1))])
        for _ in range(2):
            self.both(lambda m, c: m.denoise(block, c.view().select(rows), t))
        self.both(lambda m, c: m.denoise(block[:1].expand(c.num_rows, -1), c.view(), None))


@pytest.mark.parametrize(
    ("kind", "seed"),
    [(kind, seed) for kind in MODELS for seed in range(5) if seed or kind in RECORDED],
)
def test_any_story_gives_the_eager_tensors(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the mirror: it holds another text than the cache that a pass is of, keys of a rejected
    draft, a state that a discarded pass has moved on, or the rows of a batch that has changed. The
    first story is recorded; there is little room at first, so that mirrors grow, and there are two
    of them at most, so that they give way to others."""
    monkeypatch.setattr(arena, "LEAST_PAST", 8)
    monkeypatch.setattr(backend, "_MAX_ARENAS", 2)
    model = MODELS[kind]()
    ours = recording(model, monkeypatch) if seed == 0 else accelerate(model, "graphs")
    pair = Pair(ours, model)
    draw = random.Random(seed)
    texts = [Text(pair, [m.empty_cache(rows) for m in pair]) for rows in (1, 3, 4)]
    text = texts[0]
    for _ in range(6 if seed == 0 else 30):
        text = draw.choice([text, draw.choice(texts)])
        acts = [text.extend, text.verify, text.verify, text.denoise, text.decode]
        draw.choice(acts)(draw)
        if draw.random() < 0.1:
            some = torch.tensor([draw.randrange(text.num_rows) for _ in range(text.num_rows)])
            text.caches = [select_rows(cache, some) for cache in text.caches]
        if draw.random() < 0.15:
            draw.choice([text.lose_a_row, text.gain_a_row])(draw)
    for text in texts:
        for row in range(text.num_rows):
            if text.caches[0].lengths[row]:
                one, two = (row_state(cache, row) for cache in text.caches)
                torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("kind", ["Mamba first", "attention first"])
def test_rows_that_change_places(kind: str) -> None:
    """Guards the mirror against a change in place: the same memory, the same lengths, other texts
    in it."""
    model = MODELS[kind]()
    ours = accelerate(model, "graphs")
    block, cache = masked_like(random_ids(4, 4)), ours.prefill(random_ids(4, 5))

    def check() -> None:
        rows = block[: cache.num_rows]
        found, expected = (m.denoise(rows, cache.view(), None) for m in (ours, model))
        torch.testing.assert_close(found, expected, **CLOSE)

    check()
    keep_rows(cache, [1, 2, 3])
    check()
    keep_rows(cache, [0, 1])
    append_rows(cache, ours.prefill(random_ids(1, 5, seed=9)))
    check()
    append_rows(cache, ours.prefill(random_ids(1, 5, seed=8)))
    check()


TOLD: dict[str, object] = {"logprobs": 2, "repetition_penalty": 1.3}
SAMPLED: dict[str, object] = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
WAYS: list[dict[str, object]] = [
    {"mode": "ar", "max_new_tokens": 19}, {"mode": "ar"} | SAMPLED,
    {"mode": "mock-ar", "temperature": 1.0}, {"mode": "posterior"},
    {"mode": "diffusion", "confidence_threshold": 0.05, "max_new_tokens": 12},
    {"mode": "diffusion", "confidence_threshold": 0.05, "max_new_tokens": 12} | SAMPLED,
    {"mode": "diffusion", "steps_per_block": 3}, {"mode": "diffusion", "min_p": 0.01} | SAMPLED,
    {"mode": "speculative"}, {"mode": "speculative", "draft_passes": 2} | SAMPLED,
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "first"),
    [("attention first", {}), ("attention first", TOLD), ("thin", {}), ("thin in int8", {})],
)
def test_all_modes_write_the_eager_texts(
    kind: str, first: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards decoding as a whole: rows of all modes that join and leave share mirrors. Tokens are
    chosen and committed in the passes: noise of another row or token, a rule that is another step's
    or a token that nobody chose would show. For the first row the host may have to choose."""
    model = MODELS[kind.removesuffix(" in int8")]()
    if kind.endswith("int8"):
        model = rounded_to_eight_bits(model)
    monkeypatch.setattr(model, "unused_ids", tuple(range(4, 24)))
    ways = [way for way in WAYS if "thin" not in kind or way["mode"] in ("ar", "speculative")]
    options = [
        options_of({"block_size": 4, "max_new_tokens": 6}, way | {"seed": seed})
        for seed, way in enumerate([ways[0] | first, *ways[1:]])
    ]
    prompts = prompts_of([2 + 5 * i % 7 for i in range(len(options))])
    ours = recording(model, monkeypatch)
    monkeypatch.setattr(EagerBackend, "pass_costs", ours.pass_costs)  # which decide who drafts
    found, expected = (generate(one, prompts, options) for one in (ours, model))
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.replace(one, logprobs=None) == dataclasses.replace(other, logprobs=None)


def test_a_mirror_is_filled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the time of a step: copies of all keys would grow with the text."""
    model, copied, copy = accelerate(tiny_model(), "graphs"), list[int](), arena.Arena._copy

    def counted(mirror: arena.Arena, layers: Sequence[LayerState], num_rows: int) -> None:
        copied.append(num_rows)
        copy(mirror, layers, num_rows)

    monkeypatch.setattr(arena.Arena, "_copy", counted)
    chooser, cache = model.backend, model.prefill(random_ids(2, 5))
    assert isinstance(chooser, ChoosingBackend) and copied == [2]
    ones, sampler = torch.ones(2, dtype=torch.int64), sampler_of(RowSampler(), 2)
    for drafts in (random_ids(2, 1), random_ids(2, 4)):
        chooser.decode(cache, drafts, ones, sampler, None, 1)
        list(chooser.fill(cache.view(), masked_like(random_ids(2, 4)), sampler, ()))
    assert copied == [2]


def test_the_host_looks_once_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the wait for the host: a GPU would idle for as long as a small pass takes."""
    model = recording(tiny_model(hybrid_override_pattern="*M"), monkeypatch)
    looks, on_host, cpu = 0, arena.on_host, Tensor.cpu

    def together(tensors: Sequence[Tensor]) -> list[Tensor]:
        nonlocal looks
        looks += 1
        return on_host(tensors)

    def alone(tensor: Tensor) -> Tensor:
        nonlocal looks
        looks += tensor.dim() == 2 and tensor.dtype == torch.int64  # tokens
        return cpu(tensor)

    monkeypatch.setattr(backend, "on_host", together)
    monkeypatch.setattr(Tensor, "cpu", alone)
    generate(model, prompts_of([5, 3]), options_of({}, {"mode": "ar", "max_new_tokens": 17}))
    assert looks == 4  # at the first token of each prompt, then after 8 and 8
    looks, passes, fill = 0, list[int](), model.backend._fill_on

    def watched(*given: object) -> object:
        passes.append(len(found := fill(*given)))
        return found

    monkeypatch.setattr(model.backend, "_fill_on", watched)
    options = options_of({"block_size": 4}, {"mode": "diffusion", "max_new_tokens": 12})
    options = dataclasses.replace(options, confidence_threshold=1.0, steps_per_block=4)
    (found,) = generate(model, prompts_of([5]), options)
    assert found.nfe == 12 and passes == [1, 1, 1, 1, 4, 4]
    options = dataclasses.replace(options, confidence_threshold=0.0)
    (found,) = generate(model, prompts_of([5]), options)
    assert found.nfe == 3 and passes[6:] == [4, 1, 1]  # three were for nothing


def test_logits_that_are_not_finite_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the rows beside a broken one, which are tried again from the same cache."""
    model = recording(tiny_model(), monkeypatch)
    chooser, sampler = model.backend, sampler_of(RowSampler(), 2)
    assert isinstance(chooser, ChoosingBackend)
    cache = model.prefill(random_ids(2, 5))
    good = select_rows(cache, torch.tensor([1]))
    for state in cache.layers:
        if state is not None:
            state[0][0].fill_(float("nan"))
    drafts, ones = random_ids(2, 1), torch.ones(2, dtype=torch.int64)
    before, version = model.verify(cache, drafts).hidden[1], cache.version
    for call in (
        lambda: list(chooser.fill(cache.view(), masked_like(random_ids(2, 4)), sampler, ())),
        lambda: chooser.decode(cache, drafts, ones, sampler, None, 4),
    ):
        with pytest.raises(ValueError, match="logits are not finite"):
            call()
    assert cache.version is version and cache.lengths.tolist() == [5, 5]
    assert torch.equal(model.verify(cache, drafts).hidden[1], before)
    alone = sampler.select(torch.tensor([1]))
    tokens, _ = chooser.decode(good, drafts[1:], ones[1:], alone, None, 4)
    assert (tokens >= 0).all() and good.lengths.tolist() == [9]


@pytest.mark.parametrize("case", recorded.read_cases()[:2], ids=lambda case: case.folder.name)
def test_the_official_recordings(case: Case) -> None:
    """Guards the arithmetic, with experts: tensors and texts of the official implementation."""
    assert case.is_exact
    model = accelerate(case.model, "graphs")
    worse = {
        one.key: difference
        for one in recorded.replay(model, case)
        if not (difference := case.difference(one)) <= case.limit(one.group)
    }
    assert worse == {}
    runs = recorded.recorded_runs(case)
    found = generate(model, [run.prompt for run in runs], [run.options for run in runs])
    assert [one.tokens for one in found] == [run.tokens for run in runs]


def test_few_recordings_serve_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the time to first token: a recording takes longer than a hundred passes."""
    model = recording(tiny_model(hybrid_override_pattern="*"), monkeypatch)
    for rows in (1, 3, 4):
        cache = model.prefill(random_ids(rows, 21))
        for length in (1, 1, 5, 6, 8, 1):
            model.extend(cache, random_ids(rows, length))
    # Of 1 and of 4 rows: 32, 1 and 8 tokens.
    assert Replayed.made == 2 * 3


def test_what_asks_the_host_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the stand-in itself: a GPU refuses a pass that waits for it, and so must this."""
    model = recording(tiny_model(), monkeypatch)
    # Then the host counts tokens.
    monkeypatch.setattr(expert_products, "can_group", lambda weight: False)
    with pytest.raises(RuntimeError, match="the host asks for"):
        model.prefill(random_ids(1, 4))


def test_a_ruined_text_ruins_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards rows: NaN behind a text that is gone would pass any mask, for 0 times NaN is NaN."""
    model = recording(tiny_model(), monkeypatch)
    clean = model.prefill(random_ids(1, 4))
    ruined = select_rows(model.prefill(random_ids(1, 20)), torch.tensor([0]))
    for state in ruined.layers:
        for part in state or ():
            part.fill_(float("nan"))
    assert not model.extend(ruined, random_ids(1, 3)).isfinite().any()
    assert model.extend(clean, random_ids(1, 3)).isfinite().all()
