"""Drafts that branch: each token is verified as if what it follows stood alone, and what is kept of
a draft is all that remains of it.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from property.test_native_llama import model_of, tokens
from tiny_models import random_ids, row_state, tiny_model
from tiny_options import options_of
from twotower import Completion, ContextCache, TwoTower, accelerate, generate
from twotower.engine import drafts_denoiser
from twotower.engine.batch import Draft
from twotower.model.backend import PassCosts
from twotower.model.draft_tree import MAX_TOKENS, DraftTree, along_paths
from twotower.model.eager import EagerBackend

WAYS = ["eager", "none", "int8", "int4"]
CUTS = (0, 5, 57, 63, 64, 120)  # pasts that end before, at and behind a block of 64 keys
WINDOWED = ["mistral, window", "qwen3, window", "smollm3, window"]
FREE = PassCosts({64: 1.0}, row=0.0)


@functools.cache
def ours(name: str, way: str) -> TwoTower:
    """A model with passes in PyTorch, or native ones of a quantisation."""
    plain = model_of(name)
    return plain if way == "eager" else accelerate(plain, "native", way)  # type: ignore[arg-type]


def read(model: TwoTower, ids: Tensor) -> ContextCache:
    """The cache of one text (S,)."""
    return model.prefill(ids.unsqueeze(0)) if len(ids) else model.empty_cache(1)


def random_parents(length: int, seed: int) -> list[int]:
    """Of a tree whose branches fork at any token."""
    generator = torch.Generator().manual_seed(seed)
    later = (int(torch.randint(i + 1, (1,), generator=generator)) for i in range(length - 1))
    return [-1, *later]


def path_to(parents: list[int], index: int) -> list[int]:
    """The indices from the first one to this one."""
    path = [index]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def assert_close(found: Tensor, expected: Tensor, way: str) -> None:
    """Equal to the bit where products of whole numbers are added up."""
    exact = way in ("int8", "int4")
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0 if exact else 2e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3", *WINDOWED])
def test_each_branch_is_as_if_it_were_alone(name: str, way: str) -> None:
    """Guards lossless speculation: a token that saw another branch, or stood at another position,
    would be verified against a text that nobody wrote."""
    model, lengths = ours(name, way), torch.tensor(CUTS)
    ids, drafts = tokens(len(CUTS), max(CUTS), seed=1), tokens(len(CUTS), MAX_TOKENS, seed=2)
    parents = [random_parents(MAX_TOKENS - 5 * row, row) for row in range(len(CUTS))]
    counts = torch.tensor([len(own) for own in parents])
    cache = model.prefill(ids, lengths)
    together = model.verify(cache, drafts, counts, tree=DraftTree(parents)).hidden
    for row, own in enumerate(parents):
        alone = read(model, ids[row, : CUTS[row]])
        for index in range(1, len(own), 3):
            path = path_to(own, index)
            hidden = model.verify(alone, drafts[row : row + 1, path]).hidden[0]
            assert_close(together[row, path], hidden, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_is_kept_of_a_draft_is_a_text(way: str, num_rows: int) -> None:
    """Guards the cache: keys of a branch that was not taken would be read for ever after."""
    model, lengths = ours("llama", way), torch.tensor([60, 7, 0][:num_rows])
    ids, drafts = tokens(num_rows, 60, seed=1), tokens(num_rows, 12, seed=2)
    for seed in range(4):
        cache = model.prefill(ids, lengths)
        parents = [random_parents(12, seed + row) for row in range(num_rows)]
        paths = [path_to(own, 11 - 2 * row) for row, own in enumerate(parents)]
        output = model.verify(cache, drafts, tree=DraftTree(parents))
        before = output.hidden.clone()
        chosen = along_paths(output, paths)
        cache.commit(chosen, torch.tensor([len(path) for path in paths]))
        assert torch.equal(output.hidden, before)  # another commit could follow
        for row, path in enumerate(paths):
            alone = read(model, ids[row, : int(lengths[row])])
            kept = model.verify(alone, drafts[row : row + 1, path])
            alone.commit(kept, torch.tensor([len(path)]))
            for own, expected in zip(row_state(cache, row), row_state(alone, 0), strict=True):
                assert_close(own, expected, way)
        more = tokens(num_rows, 4, seed=3)
        whole = read(model, torch.cat([ids[0, : int(lengths[0])], drafts[0, paths[0]]]))
        after = model.verify(whole, more[:1]).hidden[0]
        assert_close(model.verify(cache, more).hidden[0], after, way)


def oracle(texts: dict[int, list[int]], unsure: range) -> object:
    """In place of the denoiser: of each position the right token among wrong ones, in columns where
    it is unsure behind them by a pattern.
    """

    def write(batch, blocks, indices) -> Iterator[None]:  # type: ignore[no-untyped-def]
        written = []
        for index in indices.tolist():
            row = batch.rows[index]
            at, cells = len(row.tokens) - 1, []
            for column in range(blocks.shape[1]):
                text = texts[row.index]
                right = text[at + column] if at + column < len(text) else 0
                wrong = (right + 1) % 60
                if column not in unsure:
                    cells.append([(right, 0.99), (wrong, 0.005)])
                    continue
                is_first = (at + column) % 3 != 1
                order = [right, wrong] if is_first else [wrong, right]
                cells.append([*zip(order, (0.5, 0.45), strict=True)])
            written.append(cells)
        yield from ()
        return written

    return write


def texts_of(
    model: TwoTower,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    unsure: range = range(MAX_TOKENS),
    only: Sequence[dict[str, object]] = ({}, {}, {}),
    **shape: object,
) -> dict[str, list[Completion]]:
    """Rows of so many tokens, by AR and from the oracle's drafts; only: options of each row."""
    prompts, found = [tokens(length, seed=length).tolist() for length in (1, 7, 40)], {}
    owner = EagerBackend if model.backend.name == "eager" else model.backend
    monkeypatch.setattr(owner, "pass_costs", FREE)
    for mode in ("ar", "speculative"):
        own = {"mode": mode} | ({} if mode == "ar" else {"drafts": "denoiser"})
        shapes = [shape | {"max_new_tokens": n} | o for n, o in zip(lengths, only, strict=False)]
        each = [options_of(of_row, own) for of_row in shapes]
        found[mode] = generate(model, prompts[: len(lengths)], each)
        texts = {index: row.tokens for index, row in enumerate(found["ar"])}
        monkeypatch.setattr(drafts_denoiser, "write", oracle(texts, unsure))
    assert [r.tokens for r in found["speculative"]] == [r.tokens for r in found["ar"]]
    return found


@pytest.mark.parametrize("way", ["eager", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_ar(
    way: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards decoding as a whole: branches are taken, in rows of unequal texts, and change no
    token; what is gained are tokens of a pass."""
    model = ours("llama", way)
    found = texts_of(model, monkeypatch, [40, 40, 40], block_size=6, temperature=temperature)
    assert max(row.context_forwards for row in found["speculative"]) <= 40 / 2.5


@pytest.mark.parametrize("way", ["eager", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_a_tree_that_is_verified_alone(
    way: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the second try after a fault: of a shorter row only padding is left where the others'
    drafts were, and a mask that does not cover it shows each token all others.
    """
    model = ours("llama", way)
    verify, calls = model.verify, itertools.count()

    def fail(cache: ContextCache, drafts: Tensor, *others: object) -> object:
        if len(drafts) > 1 and next(calls) % 2:
            raise MemoryError
        return verify(cache, drafts, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "verify", fail)
    texts_of(model, monkeypatch, [40, 7, 23], block_size=6, temperature=temperature)
    assert next(calls) > 8


def test_rows_that_more_than_logits_choose_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards penalties, which count what a draft holds before a token, and log-probabilities, of
    tokens in the order of a draft: neither knows branches, in one row of a batch or alone.
    """
    only = [{}, {"repetition_penalty": 1.5}, {"logprobs": 1}]
    found = texts_of(ours("llama", "eager"), monkeypatch, [20, 40, 40], block_size=6, only=only)
    told = [[one.logprob for one in found[mode][2].logprobs or ()] for mode in found]
    assert len(told[0]) == 40 and told[1] == pytest.approx(told[0], abs=1e-4)


@pytest.mark.filterwarnings("ignore:block_size")
@pytest.mark.parametrize("block_size", [MAX_TOKENS, 2 * MAX_TOKENS])
def test_drafts_are_no_longer_than_a_tree_may_be(
    block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards large blocks: a draft of more tokens than a tree holds ended the row."""
    model = ours("llama", "int8")
    found = texts_of(model, monkeypatch, [90, 33], range(1, 2), block_size=block_size)
    assert max(row.context_forwards for row in found["speculative"]) < 90 / 2


def test_who_cannot_verify_a_tree_says_so() -> None:
    """Guards models with Mamba layers: their state is that of the last branch, and texts flow."""
    model = tiny_model()
    assert not model.verifies_trees and model_of("llama").verifies_trees
    tree = DraftTree([[-1, 0, 0]])
    with pytest.raises(ValueError, match="drafts branch, which the context tower's Mamba layers"):
        model.verify(model.prefill(random_ids(1, 5)), random_ids(1, 3), tree=tree)
    with pytest.raises(ValueError, match="draft of 33 tokens branches; must have at most 32"):
        DraftTree([[-1, *range(32)]])


def test_shapes_of_trees() -> None:
    chain, tree, token = Draft([], [-1, 0, 1, 2]), Draft([], [-1, 0, 0]), Draft([], [-1])
    assert not chain.has_branches and tree.has_branches and not token.has_branches
    tree = DraftTree([[-1, 0, 0, 1, 2], [-1, 0]])
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2], [0, 1, 0, 0, 0]]
    assert tree.sees[0].tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10101]
    assert tree.mask[0, 0, 4].tolist() == [True, False, True, False, True]
    drafts, choices = [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]], [[7, 1, 9, 1, 1], [4, 1, 1, 1, 1]]
    assert tree.paths(drafts, choices) == [[0, 2, 4], [0]]
