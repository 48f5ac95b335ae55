"""The native passes against the PyTorch layers: every shape of a pass, state, text."""

import dataclasses
import gc
import weakref
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import fresh_model, masked_like, random_ids, random_model, tiny_config, tiny_model
from tiny_options import options_of
from twotower import ContextCache, TwoTower, accelerate, generate
from twotower.engine import MODES
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.eager import EagerBackend
from twotower.model.rows import append_rows, keep_rows, select_rows
from twotower.native import library
from twotower.native.backend import NativeBackend

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

# Sums in another order, and an exponential within 2 units in the last place, through 6 layers.
CLOSE = {"rtol": 0.0, "atol": 1e-4}
DENSE = "M*-M*-"
# Widths that fill no vector, taps, biases, groups, one head: what a fixed size would hide.
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "odd widths": {"hidden_size": 19, "vocab_size": 43, "intermediate_size": 21, "head_dim": 5},
    "biases": {"attention_bias": True, "use_bias": True, "mlp_bias": True},
    "no conv bias, two taps": {"use_conv_bias": False, "conv_kernel": 2},
    "one group, one key head": {"n_groups": 1, "num_key_value_heads": 1},
    "wide heads": {"head_dim": 40, "ssm_state_size": 33, "mamba_head_dim": 17},
    "tied heads": {"tie_word_embeddings": True},
}


def pair(name: str = "plain") -> tuple[TwoTower, TwoTower]:
    plain = tiny_model(hybrid_override_pattern=DENSE, block_size=40, **SHAPES[name])
    return plain, accelerate(plain, "native")


def assert_same_state(ours: ContextCache, plain: ContextCache) -> None:
    assert ours.lengths.tolist() == plain.lengths.tolist()
    for a, b in zip(ours.layers, plain.layers, strict=True):
        if isinstance(a, KV) and isinstance(b, KV):
            for row, length in enumerate(ours.lengths.tolist()):
                for part, other in zip(a, b, strict=True):
                    torch.testing.assert_close(part[row, :length], other[row, :length], **CLOSE)
        elif isinstance(a, MambaState) and isinstance(b, MambaState):
            for part, other in zip(a, b, strict=True):
                torch.testing.assert_close(part, other, **CLOSE)
    assert ours.last_hidden is not None and plain.last_hidden is not None
    torch.testing.assert_close(ours.last_hidden, plain.last_hidden, **CLOSE)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 8, 9, 16, 17, 24, 41, 105])
def test_every_shape_of_a_pass(name: str, length: int) -> None:
    """Guards lanes, tiles, remainders and biases: 1, 8, 16, 32 and 64 tokens are separate code,
    more are several tiles; a wrong remainder of a width shows in no test of one size."""
    plain, ours = pair(name)
    ids = random_ids(1, 21)
    caches = [model.prefill(ids) for model in (ours, plain)]
    assert_same_state(*caches)
    block = masked_like(random_ids(1, length, seed=1))
    for t in (None, torch.tensor([1.0]), torch.tensor([0.75])):  # tables are remembered by time
        found, expected = (m.denoise(block, caches[1].view(), t) for m in (ours, plain))
        torch.testing.assert_close(found, expected, **CLOSE)
    more = random_ids(1, length, seed=2)
    hidden, expected = (m.extend(c, more) for m, c in zip((ours, plain), caches, strict=True))
    torch.testing.assert_close(hidden, expected, **CLOSE)
    assert_same_state(*caches)
    for model, cache in zip((ours, plain), caches, strict=True):
        cache.commit(model.verify(cache, more), torch.tensor([length - length // 3]))
    assert_same_state(*caches)
    found, expected = (m.next_logits(caches[1]) for m in (ours, plain))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("size", [1, 7, 12, 16, 60])
def test_times_of_a_block_are_there_before_it(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Guards the first text's time: a masked fraction that another rounding has made is not found,
    and its modulations are computed between the passes, in silence."""
    plain = tiny_model(hybrid_override_pattern=DENSE, block_size=size)
    ours, view = accelerate(plain, "native"), plain.prefill(random_ids(1, 5)).view()
    missed = "twotower.native.denoiser.modulations"
    monkeypatch.setattr(missed, lambda *_: pytest.fail("a time was not known"))
    for num_masked in range(1, size + 1):
        t = (torch.arange(size) < num_masked).float().mean(-1, keepdim=True)
        ours.denoise(random_ids(1, size), view, t)


CHANGES = ["none", "another backend", "a row leaves", "rows come", "growth"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("is_draft", "kept"), [(False, [5, 5]), (True, [5, 5]), (True, [2, 4]), (True, [0, 5])]
)
def test_a_pass_reads_where_states_are_now(change: str, is_draft: bool, kept: list[int]) -> None:
    """Guards addresses that a pass before has left: states that have moved since are read where
    they were, a text that never was, in silence."""
    plain, ours = pair()
    cache, tokens = ours.prefill(random_ids(2, 9)), random_ids(2, 5, seed=1)
    cache.commit(ours.verify(cache, tokens, None, is_draft), torch.tensor(kept))
    if change == "another backend":
        plain.extend(cache, tokens)
    elif change == "a row leaves":
        keep_rows(cache, [1])
    elif change == "rows come":
        append_rows(cache, ours.prefill(random_ids(1, 4)))
    elif change == "growth":
        ours.extend(cache, random_ids(2, 200, seed=2))
    same = select_rows(cache, torch.arange(cache.num_rows))  # elsewhere
    block, more = (masked_like(random_ids(cache.num_rows, 4, seed=i)) for i in (3, 4))
    assert ours.denoise(block, cache.view(), None).equal(ours.denoise(block, same.view(), None))
    for count in (3, 1):
        outputs = [ours.verify(one, more) for one in (cache, same)]
        assert outputs[0].hidden.equal(outputs[1].hidden)
        for one, output in zip((cache, same), outputs, strict=True):
            one.commit(output, torch.full((cache.num_rows,), count))
    assert_same_state(cache, same)


@given(
    lengths=st.lists(st.integers(0, 20), min_size=2, max_size=4).filter(any),
    counts=st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(any),
    accepted=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    seed=st.integers(0, 20),
)
def test_rows_of_different_lengths(
    lengths: list[int], counts: list[int], accepted: list[int], seed: int
) -> None:
    """Guards rows: each has its own past, a row that commits nothing keeps its state, and a row of
    which less is worth reading gives no other state than if all had been read, nor NaN beyond."""
    plain, ours = pair()
    num_rows = len(lengths)
    ids, more = random_ids(num_rows, max(lengths), seed=seed), random_ids(num_rows, 6, seed=1)
    caches = [model.prefill(ids, torch.tensor(lengths)) for model in (ours, plain)]
    for model, cache in zip((ours, plain), caches, strict=True):
        model.extend(cache, more, torch.tensor(counts[:num_rows]))
        wanted = torch.tensor(accepted[:num_rows])
        worth = wanted.clamp(min=1) if model is ours else None
        output = model.verify(cache, more[:, :5], worth)
        assert output.hidden.isfinite().all()
        cache.commit(output, wanted)
    assert_same_state(*caches)
    block = masked_like(random_ids(num_rows, 4, seed=seed + 2), seed)
    t = torch.linspace(0.2, 1.0, num_rows)
    found, expected = (m.denoise(block, caches[0].view(), t) for m in (ours, plain))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_denoiser_reads_the_layers_that_it_names() -> None:
    """Guards towers of different depths: states of the layer with the same number have the right
    size, and are those of another layer."""
    config = tiny_config(hybrid_override_pattern=DENSE)
    kept = (1, 3, 5)  # attention, Mamba, MLP
    layers = tuple(config.denoiser.layers[index] for index in kept)
    shallow = dataclasses.replace(config.denoiser, layers=layers)
    for reads in ((4, 0, 2), kept):
        plain = random_model(config.replace(denoiser=shallow, reads=reads))
        ours = accelerate(plain, "native")
        view, block = plain.prefill(random_ids(1, 21)).view(), masked_like(random_ids(1, 20))
        found, expected = (m.denoise(block, view, torch.tensor([0.5])) for m in (ours, plain))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("block_size", [1, 7, 16, 23, 40])
def test_every_token_of_a_block_sees_the_whole_block(block_size: int) -> None:
    """Guards blocks longer than a tile: a first tile that does not see the tokens of the second
    gives smooth texts, and worse ones."""
    _, ours = pair()
    view = ours.prefill(random_ids(1, 9)).view()
    block = random_ids(1, block_size, seed=1)
    before = ours.denoise(block, view, None)
    for place in {0, block_size // 2, block_size - 1}:
        changed = block.clone()
        changed[0, place] = (changed[0, place] + 1) % 41
        after = ours.denoise(changed, view, None)
        assert bool((after != before).any(-1).all()), place


def test_a_hidden_key_has_no_weight_at_all() -> None:
    """Guards against a weight that is small and not none: 1e-38 of a large enough value shows."""
    plain = fresh_model(hybrid_override_pattern="*-").requires_grad_(False)
    plain.context_tower.embeddings.weight[:, 3] = 0.0
    plain.context_tower.embeddings.weight[40, 3] = 1.0
    plain.get_parameter("context_tower.layers.0.mixer.v_proj.weight")[:, 3] = 1e38
    ours, ids = accelerate(plain, "native"), random_ids(1, 12, vocab_size=40)
    late = ids.clone()
    late[0, -1] = 40
    before, after = (ours.extend(ours.empty_cache(1), tokens) for tokens in (ids, late))
    assert torch.equal(before[:, :-1], after[:, :-1])


def test_a_text_gives_the_same_bits_however_it_is_cut() -> None:
    """Guards tiles and blocks of keys: cut at the passes' own borders, nothing is added up in
    another order; and rows, which have passes of their own whatever their neighbours are."""
    _, ours = pair()
    lengths = [150, 80, 64, 33, 1]
    ids = random_ids(len(lengths), 150)
    whole = ours.prefill(ids, torch.tensor(lengths))
    pieces = ours.prefill(ids, torch.tensor(lengths), chunk_size=48)
    for row, length in enumerate(lengths):
        alone = ours.prefill(ids[row : row + 1, :length])
        assert alone.last_hidden is not None
        for other in (whole, pieces):
            assert other.last_hidden is not None
            assert torch.equal(alone.last_hidden[0], other.last_hidden[row]), length


def test_drafts_of_any_length_are_cut_anywhere() -> None:
    """Guards states that are made after the pass: of more tokens than a tile, of none, and of
    exactly as many as a pass of that length leaves."""
    _, ours = pair()
    cache = ours.prefill(random_ids(1, 21))
    draft = random_ids(1, 105, seed=1)
    for count in (0, 1, 15, 16, 17, 33, 63, 64, 65, 96, 97, 105):
        cut, read = select_rows(cache, torch.tensor([0])), select_rows(cache, torch.tensor([0]))
        cut.commit(ours.verify(cut, draft), torch.tensor([count]))
        if count:
            ours.extend(read, draft[:, :count])
        assert_same_state(cut, read)


def test_a_forward_output_outlives_its_cache() -> None:
    """Guards memory: states are made from addresses of a cache that nobody else may hold."""
    _, ours = pair()
    cache = ours.prefill(random_ids(1, 9))
    states = [weakref.ref(state.ssm) for state in cache.layers if isinstance(state, MambaState)]
    output = ours.verify(cache, random_ids(1, 4))
    del cache
    gc.collect()
    assert output.states_after(torch.tensor([2])) and all(state() is not None for state in states)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("pattern", [DENSE, "*-"])
def test_what_a_later_pass_overwrote_is_not_committed(
    pattern: str, backend: Literal["eager", "native"]
) -> None:
    """Guards two passes over one cache, the first of which is committed: it would have the keys of
    the other's tokens."""
    ours = accelerate(tiny_model(hybrid_override_pattern=pattern), backend)
    cache, draft = ours.prefill(random_ids(2, 9)), random_ids(2, 4, seed=1)
    first, newest = ours.verify(cache, draft.flip(1)), ours.verify(cache, draft)
    with pytest.raises(ValueError, match="earlier pass"):
        cache.commit(first, torch.tensor([4, 4]))
    cache.commit(newest, torch.tensor([4, 2]))
    with pytest.raises(ValueError, match="earlier pass"):
        cache.commit(newest, torch.tensor([4, 2]))
    expected = ours.prefill(random_ids(2, 9))
    ours.extend(expected, draft, torch.tensor([4, 2]))
    assert_same_state(cache, expected)


def test_a_row_that_enters_where_one_left_has_its_own_place() -> None:
    """Guards remembered addresses: the buffers are the same ones, and the new row has none yet."""
    ours = accelerate(tiny_model(hybrid_override_pattern="*-"), "native")
    cache, newcomer = ours.prefill(random_ids(3, 9)), ours.prefill(random_ids(1, 5, seed=1))
    keep_rows(cache, [0, 1])
    ours.extend(cache, random_ids(2, 1))
    append_rows(cache, select_rows(newcomer, torch.tensor([0])))
    more = random_ids(3, 4, seed=2)
    ours.extend(cache, more)
    ours.extend(newcomer, more[2:])
    assert_same_state(select_rows(cache, torch.tensor([2])), newcomer)


def test_a_denoiser_pass_leaves_the_cache_bit_identical() -> None:
    """Guards the architecture's main claim where it is easiest to break: at raw addresses."""
    _, ours = pair()
    cache = ours.prefill(random_ids(2, 9), torch.tensor([9, 4]))
    before = [part.clone() for state in cache.layers if state is not None for part in state]
    ours.denoise(masked_like(random_ids(2, 8)), cache.view(), torch.tensor([0.5, 1.0]))
    after = [part for state in cache.layers if state is not None for part in state]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_size", [4, 20])
def test_the_same_texts(
    mode: str, temperature: float, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards decoding as a whole: rows that leave, caches cut to those that stay."""
    prompts = [random_ids(length, seed=length).tolist() for length in (1, 7, 30)]
    o = options_of(
        {"steps_per_block": 3, "block_size": block_size},
        {"mode": mode, "max_new_tokens": 26, "temperature": temperature, "eos_token_id": 7},
    )
    plain, ours = pair()
    monkeypatch.setattr(EagerBackend, "pass_costs", ours.pass_costs)  # which decide who drafts
    found, expected = (generate(m, prompts, o) for m in (ours, plain))
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert [row.nfe for row in found] == [row.nfe for row in expected]


def parameters(model: TwoTower) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def test_weights_are_not_copied() -> None:
    """Guards memory: the promise is one set of weights, under the released names."""
    plain, ours = pair()
    assert {n: p.data_ptr() for n, p in parameters(ours).items()} == {
        n: p.data_ptr() for n, p in parameters(plain).items()
    }
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_nan_is_not_hidden() -> None:
    """Guards the check for damaged weights behind the pass: a clamp must not swallow NaN."""
    for name in ("layers.0.mixer.conv1d.bias", "layers.1.mixer.k_proj.weight", "norm_f.weight"):
        plain = fresh_model(hybrid_override_pattern=DENSE).requires_grad_(False)
        plain.get_parameter(f"denoiser_tower.{name}").fill_(float("nan"))
        ours = plain.with_backend(NativeBackend(plain, "none"))
        logits = ours.denoise(
            masked_like(random_ids(1, 4)), ours.prefill(random_ids(1, 5)).view(), None
        )
        assert bool(logits.isnan().any()), name


def test_ids_outside_the_vocabulary_raise() -> None:
    _, ours = pair()
    for token in (-1, 41):
        with pytest.raises(IndexError, match="leave the vocabulary"):
            ours.prefill(torch.tensor([[5, token]]))
