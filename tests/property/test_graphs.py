"""Passes of fixed shapes, as they run on a GPU: recorded by a stand-in that traces and replays."""

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
from twotower import ContextCache, TwoTower, accelerate, generate
from twotower.checkpoint.denoiser import with_new_denoiser
from twotower.config import DraftSpec
from twotower.families import config_from_dict
from twotower.graphs import arena, backend
from twotower.kernels import ops
from twotower.model.thin import thin_config

# float32 sums in another order, through 6 layers
CLOSE = {"rtol": 0.0, "atol": 2e-4}
LLAMA: dict[str, object] = {
    "model_type": "qwen3", "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "block_size": 4, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
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
            output = (self.pair.eager if is_eager else model).verify(cache, ids)
            if between:
                model.verify(cache, ids.flip(1))
            if keeps:
                cache.commit(output, counts)
            return output.hidden

        self.both(work)

    def lose_a_row(self, draw: random.Random) -> None:
        if self.num_rows > 1:
            stay = draw.sample(range(self.num_rows), self.num_rows - 1)
            for cache in self.caches:
                cache.keep(stay)

    def gain_a_row(self, draw: random.Random) -> None:
        """Its text is as long as the first one's, which may be what a row had that has left."""
        length, seed = int(self.caches[0].lengths[0]), draw.randrange(99)
        for model, cache in zip(self.pair, self.caches, strict=True):
            ids = random_ids(1, max(1, length), seed=seed)
            cache.append(model.prefill(ids) if length else model.empty_cache(1))

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
    monkeypatch.setattr(backend, "_MOST_ARENAS", 2)
    model = MODELS[kind]()
    ours = recording(model, monkeypatch) if seed == 0 else accelerate(model, "graphs")
    pair = Pair(ours, model)
    draw = random.Random(seed)
    texts = [Text(pair, [m.empty_cache(rows) for m in pair]) for rows in (1, 3, 4)]
    text = texts[0]
    for _ in range(6 if seed == 0 else 30):
        text = draw.choice([text, draw.choice(texts)])
        draw.choice([text.extend, text.verify, text.verify, text.denoise])(draw)
        if draw.random() < 0.1:
            some = torch.tensor([draw.randrange(text.num_rows) for _ in range(text.num_rows)])
            text.caches = [cache.select(some) for cache in text.caches]
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
    cache.keep([1, 2, 3])
    check()
    cache.keep([0, 1])
    cache.append(ours.prefill(random_ids(1, 5, seed=9)))
    check()
    cache.append(ours.prefill(random_ids(1, 5, seed=8)))
    check()


@pytest.mark.parametrize("kind", ["attention first", "thin"])
def test_all_modes_write_the_eager_texts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards decoding as a whole: rows of all modes that join and leave share mirrors."""
    model = MODELS[kind]()
    modes = ["ar", "mock-ar", "diffusion", "speculative"][:: 3 if kind == "thin" else 1]
    options = [
        options_of({"block_size": 4, "seed": 7}, {"mode": mode, "max_new_tokens": count} | more)
        for mode in modes
        for count, more in ((2, {}), (5, {"temperature": 1.0}))
    ]
    prompts = prompts_of([2 + 5 * i % 7 for i in range(len(options))])
    found = generate(recording(model, monkeypatch), prompts, options)
    expected = generate(model, prompts, options)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.nfe for one in found] == [one.nfe for one in expected]


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
    monkeypatch.setattr(ops, "can_group", lambda weight: False)  # then the host counts tokens
    with pytest.raises(RuntimeError, match="the host asks for"):
        model.prefill(random_ids(1, 4))


def test_a_ruined_text_ruins_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards rows: NaN behind a text that is gone would pass any mask, for 0 times NaN is NaN."""
    model = recording(tiny_model(), monkeypatch)
    clean = model.prefill(random_ids(1, 4))
    ruined = model.prefill(random_ids(1, 20)).select(torch.tensor([0]))
    for state in ruined.layers:
        for part in state or ():
            part.fill_(float("nan"))
    assert not model.extend(ruined, random_ids(1, 3)).isfinite().any()
    assert model.extend(clean, random_ids(1, 3)).isfinite().all()


def test_costs_of_passes_are_by_the_weights_that_they_read() -> None:
    """Half of the experts are chosen by a token, so a second token misses a quarter of them."""
    experts, dense = tiny_model(), tiny_model(hybrid_override_pattern="M*-")
    assert accelerate(dense, "graphs").pass_costs[16] == 1.0
    costs = accelerate(experts, "graphs").pass_costs
    layers = experts.context_tower.layers
    total = sum(p.numel() for p in [*layers.parameters(), *experts.context_lm_head.parameters()])
    routed = 4 * 2 * 16 * 12  # one layer
    assert costs[1] == 1.0
    assert costs[4] == pytest.approx((total - routed / 16) / (total - routed / 2))
