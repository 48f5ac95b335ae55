"""Native passes of Llama's relatives against the PyTorch layers, in float32, int8 and int4."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from packed_groups import packed_groups, plain_groups
from tiny_models import random_model
from tiny_options import options_of
from twotower import TwoTower, accelerate, generate
from twotower.families import config_from_dict
from twotower.layers.attention import KV
from twotower.native import library, tower
from twotower.specs import AttentionSpec

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

CLOSE = {"rtol": 0.0, "atol": 2e-4}
SIZES: dict[str, object] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "block_size": 24, "eos_token_id": 66,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, odd widths": {
        "model_type": "llama", "hidden_size": 37, "intermediate_size": 45, "head_dim": 10,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rope_parameters": LLAMA3,
    },
    "llama, ten queries share keys": {
        "model_type": "llama", "num_attention_heads": 10, "num_key_value_heads": 1, "head_dim": 8,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "llama, yarn": {"model_type": "llama", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "mistral, window": {"model_type": "mistral", "sliding_window": 17},
    "qwen3, window": {
        "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 3,
        "max_window_layers": 1,
    },
    "smollm3, window": {
        "model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True,
        "sliding_window": 67, "layer_types": ["full_attention", *["sliding_attention"] * 2],
    },
}  # fmt: skip


@functools.cache
def model_of(name: str) -> TwoTower:
    return random_model(config_from_dict(SIZES | CASES[name]))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(66, shape, generator=torch.Generator().manual_seed(seed))


def half_masked(*shape: int, seed: int = 0) -> Tensor:
    """Blocks in which every other token is the mask, one past the vocabulary."""
    found = tokens(*shape, seed=seed)
    found[:, ::2] = 67
    return found


@pytest.mark.parametrize("name", CASES)
def test_passes_are_those_of_the_layers(name: str) -> None:
    """Guards positions, norms of heads, biases and gates, in tiles of 1, 8, 16 and 64 tokens: one
    that is missing gives plausible nonsense."""
    plain = model_of(name)
    ours = accelerate(plain, "native")
    for length in (1, 5, 16, 17, 64, 150):
        ids = tokens(1, length, seed=length)
        cache, other = ours.prefill(ids), plain.prefill(ids)
        torch.testing.assert_close(cache.last_hidden, other.last_hidden, **CLOSE)
        for a, b in zip(cache.layers, other.layers, strict=True):
            if isinstance(a, KV) and isinstance(b, KV):
                torch.testing.assert_close(a.k, b.k, **CLOSE)
                torch.testing.assert_close(a.v, b.v, **CLOSE)
        for block_size in (1, 5, 16, 24, 70):
            block = half_masked(1, block_size)
            for t in (None, torch.tensor([0.5])):
                found, expected = (m.denoise(block, other.view(), t) for m in (ours, plain))
                torch.testing.assert_close(found, expected, **CLOSE)
        more = tokens(1, 9, seed=1)
        for model, one in ((ours, cache), (plain, other)):
            one.commit(model.verify(one, more), torch.tensor([7]))
            model.extend(one, more[:, :1])
        torch.testing.assert_close(ours.next_logits(cache), plain.next_logits(other), **CLOSE)


@pytest.mark.parametrize("name", ["smollm3", "mistral, window"])
def test_rows_of_different_lengths(name: str) -> None:
    """Guards positions, and windows, that are those of the longest row, or of the batch."""
    plain = model_of(name)
    ours = accelerate(plain, "native")
    ids, lengths = tokens(4, 23), torch.tensor([9, 1, 23, 0])
    for chunk in (1, 4, 23):
        cache = ours.prefill(ids, lengths, chunk_size=chunk)
        other = plain.prefill(ids, lengths, chunk_size=chunk)
        for model, one in ((ours, cache), (plain, other)):
            model.extend(one, tokens(4, 6, seed=1), torch.tensor([6, 0, 1, 3]))
        torch.testing.assert_close(ours.next_logits(cache), plain.next_logits(other), **CLOSE)
        block, t = half_masked(4, 5), torch.tensor([0.1, 0.5, 0.9, 1.0])
        found, expected = (m.denoise(block, other.view(), t) for m in (ours, plain))
        torch.testing.assert_close(found, expected, **CLOSE)


def test_only_the_denoiser_knows_the_mask() -> None:
    """Guards a read behind the embeddings: the context tower has no row for that id."""
    ours = accelerate(model_of("llama"), "native")
    view = ours.prefill(tokens(1, 3)).view()
    for call in (lambda: ours.prefill(torch.tensor([[67]])),
                 lambda: ours.denoise(torch.tensor([[68]]), view, None)):  # fmt: skip
        with pytest.raises(IndexError, match="leave the vocabulary"):
            call()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_one_token_and_many_give_the_same_bits(name: str, quantization: str) -> None:
    """Guards lossless speculation: a token read alone, in a tile of 8, 16 or 64, or in another cut
    of the prompt, must be the same token; a sum in another order is another number to round."""
    ours = accelerate(model_of(name), "native", quantization)  # type: ignore[arg-type]
    ids = tokens(1, 150, seed=3)
    whole = ours.extend(ours.empty_cache(1), ids)
    for cuts in ([1] * 150, [64, 64, 16, 6], [5, 8, 1, 70, 66], [16] * 9 + [6], [9, 141]):
        cache = ours.empty_cache(1)
        parts = [ours.extend(cache, piece) for piece in ids.split(cuts, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), whole), cuts
        assert torch.equal(ours.next_logits(cache), ours.context_head(whole)[:, -1]), cuts


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("block_size", [5, 16, 24])
def test_speculative_texts_are_those_of_ar(quantization: str, block_size: int) -> None:
    """Guards decoding as a whole: drafts of the denoiser, verified in blocks, change no token."""
    for name in ("llama", "qwen3", "smollm3", "mistral, window", "smollm3, window"):
        ours = accelerate(model_of(name), "native", quantization)  # type: ignore[arg-type]
        prompts = [tokens(length, seed=length).tolist() for length in (1, 7, 40)]
        texts = {}
        for mode in ("ar", "speculative"):
            o = options_of({"block_size": block_size}, {"mode": mode, "max_new_tokens": 40})
            texts[mode] = [row.tokens for row in generate(ours, prompts, o)]
        assert texts["speculative"] == texts["ar"], name


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    """Guards reproducibility: a sum that is cut differently rounds differently."""
    monkeypatch.setattr(tower, "LARGE", 0)
    ours = accelerate(model_of("qwen3"), "native", quantization)  # type: ignore[arg-type]
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            cache = ours.prefill(tokens(2, 81), torch.tensor([81, 9]))
            hidden = ours.extend(cache, tokens(2, 1))
            block = ours.denoise(half_masked(2, 24), cache.view(), torch.tensor([0.5, 1.0]))
            found.append([hidden, block, ours.next_logits(cache)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def on_grid(kind: str, generator: torch.Generator) -> Tensor:
    """Weights as a GGUF file of Q4_0 or Q4_1 has them: its largest number is on the grid's end."""
    numbers = torch.randint(0, 16, (48, 3, 32), generator=generator).float()
    scale = (torch.rand(48, 3, 1, generator=generator) * 0.01 + 1e-3).half().float()
    numbers[:, :, 3] = 0.0
    if kind == "Q4_0":
        scale *= torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
        return ((numbers - 8) * scale).flatten(1)
    numbers[:, :, 5] = 15.0
    offset = (-torch.rand(48, 3, 1, generator=generator) * 0.08).half().float()
    return (numbers * scale + offset).flatten(1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_weights_of_a_gguf_file_are_kept_exactly(kind: str) -> None:
    """Guards against rounding twice: 4 bits that were chosen once are the model."""
    weight = on_grid(kind, torch.Generator().manual_seed(0))
    found = packed_groups(weight).values()
    assert (found - weight).abs().max() <= 1e-8 * (kind == "Q4_1") + 1e-9
    assert (packed_groups(weight).numbers.unflatten(1, (-1, 32)).float().std(-1) > 2).all()


def test_groups_of_any_values() -> None:
    """Guards zero groups, equal numbers, one sign, and the error of the rest."""
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2] = 0.0, 0.25, weight[2].abs() + 3
    found = packed_groups(weight).values()
    assert torch.equal(found[:2], weight[:2])
    spread = weight.unflatten(1, (-1, 32)).aminmax(dim=-1)
    step = ((spread.max - spread.min) / 15).repeat_interleave(32, dim=1)
    assert ((found - weight).abs() <= 0.55 * step + 2e-3 * weight.abs()).all()
    nan = weight.clone()
    nan[3, 40] = float("nan")
    assert packed_groups(nan).values()[3, 32:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [16, 37])
def test_int4_is_what_plain_code_makes_of_it(rows: int, dtype: torch.dtype) -> None:
    """Guards who loads a model: numbers, scales and offsets of any size, in whichever dtype the
    file has them, a half that overflows or is below the smallest."""
    sizes = torch.logspace(-9, 3, rows).unsqueeze(1)
    noise = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    weight = (noise * sizes).to(dtype)
    weight[3], weight[4] = 0.0, 0.25
    for found, expected in zip(packed_groups(weight), plain_groups(weight), strict=True):
        assert torch.equal(found, expected)


def grouped_product(x: Tensor, weight: Tensor) -> Tensor:
    """What an int4 product is: whole tokens in groups of 32, their scales, the weights' grid."""
    groups = x.unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    whole = (groups * torch.where(most > 0, 127 / most, 0.0)).round() * (most / 127)
    return (whole.flatten(-2).double() @ packed_groups(weight).values().double().mT).float()


@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3"])
def test_int4_equals_plain_code_of_the_same_rounding(name: str) -> None:
    """Guards which number gets which scale: a swapped nibble is far off, and texts still flow."""
    plain = random_model(model_of(name).config)
    ours = accelerate(model_of(name), "native", "int4")
    for path, module in plain.context_tower.named_modules():
        if path.endswith("_proj"):
            assert isinstance(module, torch.nn.Linear)
            module.forward = functools.partial(_as_int4, module)  # type: ignore[method-assign]
    for length in (1, 7, 16, 80):
        ids = tokens(1, length, seed=length)
        found, expected = ours.prefill(ids).last_hidden, plain.prefill(ids).last_hidden
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)
        full = model_of(name).prefill(ids).last_hidden
        assert (
            full is not None and (full - found).abs().max() > 0.05
        )  # it is int4 that was compared


def _as_int4(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    y = grouped_product(x, linear.weight)
    return y if linear.bias is None else y + linear.bias


def test_layers_that_differ_in_positions_alone_are_no_obstacle() -> None:
    """Guards SmolLM3: room for states is made by the sizes of one layer, and positions are none."""
    specs = model_of("smollm3").config.context.layers_of(AttentionSpec)
    assert len(set(specs)) == 2
    assert len({dataclasses.replace(spec, rope=None) for spec in specs}) == 1


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "llama, odd widths", "mistral, window"])
def test_rows_of_a_pass_are_those_of_their_own(name: str, quantization: str) -> None:
    """Guards tiles that rows share: a lane, a position or a past of a neighbour gives plausible
    text. Rows of 1 to 40 tokens after pasts of 0 to 70; a token alone is summed in another order.
    """
    if quantization == "int4" and name == "llama, odd widths":
        pytest.skip("its rows are no whole number of groups")
    ours = accelerate(model_of(name), "native", quantization)  # type: ignore[arg-type]
    for counts in ([2, 3, 2], [16, 2, 17, 3], [40, 1, 5, 1, 1], [1] * 20, [8] * 9, [0, 4, 0, 20]):
        lengths = torch.tensor([7 * i % 71 for i in range(len(counts))])
        ids, more = tokens(len(counts), 70, seed=1), tokens(len(counts), max(counts), seed=2)
        cache = ours.prefill(ids, lengths)
        given = torch.tensor(counts)
        together = ours.verify(cache, more, given).hidden
        block = half_masked(len(counts), 6)
        drafts = ours.denoise(block, cache.view(), None)
        for row, count in enumerate(counts):
            own = (
                ours.prefill(ids[row : row + 1, : lengths[row]])
                if lengths[row]
                else ours.empty_cache(1)
            )
            alone = ours.denoise(block[row : row + 1], own.view(), None)[0]
            torch.testing.assert_close(drafts[row], alone, rtol=0.0, atol=2e-4)
            if count:
                hidden = ours.verify(own, more[row : row + 1, :count]).hidden[0]
                torch.testing.assert_close(together[row, :count], hidden, rtol=0.0, atol=2e-4)
