"""Native passes in int8, with 4 bits of a checkpoint, by several threads: against plain code."""

import copy
import os
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from tiny_models import fresh_model, masked_like, random_ids, tiny_model
from tiny_options import options_of
from tiny_quantised import four_bits
from twotower import GenerateOptions, TwoTower, accelerate, generate, load_tokenizer
from twotower.checkpoint import load_checkpoint
from twotower.checkpoint.files import shipped_folder
from twotower.cli.demo import SAMPLES
from twotower.cli.main import main
from twotower.engine import MODES
from twotower.kernels.quantised import dequantise, to_eight_bits
from twotower.model.precision import Scheme, quantise_modules, weight_bits
from twotower.native import library, tower
from twotower.native.backend import NativeBackend
from twotower.native.weights import native_linear

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

DENSE = "M*-M*-"
INT8 = Scheme(weights="int8", activations="int8")
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "odd widths": {"hidden_size": 19, "vocab_size": 43, "intermediate_size": 21, "head_dim": 5},
    "biases": {"attention_bias": True, "use_bias": True, "mlp_bias": True},
    "tied heads": {"tie_word_embeddings": True},
}


def quantised_product(x: Tensor, weight: Tensor) -> Tensor:
    """What an int8 product is, in plain PyTorch: whole numbers in groups of 32, then two scales."""
    numbers, scales, *_ = to_eight_bits(weight)
    groups, others = (grouped(part) for part in (x, numbers.double()))
    most = groups.abs().amax(-1, keepdim=True)
    whole = (groups * torch.where(most > 0, 127 / most, 0.0)).round()
    sums = torch.einsum("...gk,ngk->...ng", whole.double(), others)
    sums = sums * (most / 127).double().mT
    return (sums.sum(-1) * scales.squeeze(-1)).float()


def grouped(x: Tensor) -> Tensor:
    """x (..., K) -> (..., groups, 32), zeros beyond K."""
    return nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))


class Quantised(nn.Module):
    """A linear layer as int8 computes it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = quantised_product(x, self.weight)
        return y if self.bias is None else y + self.bias


def quantised_other(**config: object) -> TwoTower:
    """A plain model whose projections are `Quantised`."""
    model = copy.deepcopy(tiny_model(hybrid_override_pattern=DENSE, **config))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and weight_bits(f"{name}.weight", (), INT8):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, Quantised(module))
    return model


def int8_model(**config: object) -> TwoTower:
    return accelerate(tiny_model(hybrid_override_pattern=DENSE, **config), "native", "int8")


@pytest.fixture
def threads() -> Iterator[None]:
    """Give back PyTorch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared_work(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Small models work in several threads, too."""
    monkeypatch.setattr(tower, "LARGE", 0)


def whole_numbers(rows: int, width: int, seed: int) -> Tensor:
    """Whole numbers from -127 to 127; each group of a row has 127, so that its scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-127, 128, (rows, width), generator=generator).float()
    numbers[:, ::32] = 127.0
    return numbers


@pytest.mark.parametrize("width", [1, 3, 4, 19, 64, 257])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_sums_are_exact(rows: int, width: int) -> None:
    """Guards packing, remainders and the largest values: any error is off by a whole number."""
    weight = whole_numbers(rows, width, seed=0)
    product = native_linear(to_eight_bits(weight))
    for length in (1, 2, 8, 9, 16, 35):
        x = whole_numbers(length, width, seed=length)
        expected = (x.long() @ weight.long().mT).float()
        assert torch.equal(product(x), expected), length


def test_products_of_any_values() -> None:
    """Guards the two scales and the rounding of tokens: each row, each token has its own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(45, 70, generator=generator) * torch.logspace(-6, 3, 45).unsqueeze(1)
    x = torch.randn(40, 70, generator=generator) * torch.logspace(3, -6, 40).unsqueeze(1)
    weight[7], x[5] = 0.0, 0.0  # no scale at all
    found = native_linear(to_eight_bits(weight))(x)
    expected = quantised_product(x, weight)
    size = x.abs().amax(1, keepdim=True) * weight.abs().amax(1)  # three groups' sums may cancel
    torch.testing.assert_close(found / size, expected / size, rtol=0.0, atol=1e-5, equal_nan=True)
    assert not found[5].any() and not found[:, 7].any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_4_bits_of_a_checkpoint_are_not_rounded_again(rows: int, group_size: int) -> None:
    """Guards scales and offsets that a half cannot hold, and which group a column belongs to."""
    matrix = four_bits(rows, 256, group_size)
    weight, product = dequantise(matrix, torch.float64), native_linear(matrix)
    for length in (1, 3, 8, 16, 35, 64):
        x = whole_numbers(length, 256, seed=length)
        size = x.abs().double() @ weight.abs().mT
        away = (product(x).double() - x.double() @ weight.mT).abs() / size
        assert away.max() < 2e-7, length


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 9, 16, 27])
def test_passes_equal_plain_code_of_the_same_rounding(name: str, length: int) -> None:
    """Guards which matrix gets which scales: a swapped one is far off, and texts still flow."""
    ours, plain = int8_model(**SHAPES[name]), quantised_other(**SHAPES[name])
    ids = random_ids(1, 21)
    cache, other = ours.prefill(ids), plain.prefill(ids)
    close = {"rtol": 0.0, "atol": 0.02}  # a token that rounds to the next whole number
    block, t = masked_like(random_ids(1, length, seed=1)), torch.tensor([0.75])
    found, expected = (m.denoise(block, other.view(), t) for m in (ours, plain))
    torch.testing.assert_close(found, expected, **close)
    more = random_ids(1, length, seed=2)
    hidden, expected = ours.extend(cache, more), plain.extend(other, more)
    torch.testing.assert_close(hidden, expected, **close)
    torch.testing.assert_close(ours.next_logits(cache), plain.next_logits(other), **close)
    wide = tiny_model(hybrid_override_pattern=DENSE, **SHAPES[name])
    away = (wide.denoise(block, other.view(), t) - found).abs().max()
    assert away > 1e-4  # it is int8 that was compared


def passes(model: TwoTower, length: int) -> list[Tensor]:
    """What every kind of pass gives, and the state that it leaves."""
    cache = model.prefill(random_ids(2, 21), torch.tensor([21, 9]))
    logits = model.denoise(
        masked_like(random_ids(2, length, seed=1)), cache.view(), torch.tensor([0.5, 1.0])
    )
    hidden = model.extend(cache, random_ids(2, length, seed=2))
    states = [part for state in cache.layers if state is not None for part in state]
    return [logits, hidden, model.next_logits(cache), *states]


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_threads_change_no_bit(shared_work: None, quantization: str, length: int) -> None:
    """Guards reproducibility: a sum that is cut differently rounds differently."""
    model = tiny_model(hybrid_override_pattern=DENSE, hidden_size=48, intermediate_size=100)
    ours = accelerate(model, "native", quantization)  # type: ignore[arg-type]
    found = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        found.append(passes(ours, length))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_passes_at_the_same_time(shared_work: None) -> None:
    """Guards two queues: one pass has the helpers, the other runs alone, both are right."""
    ours = int8_model()
    torch.set_num_threads(2)
    expected = passes(ours, 16)
    with ThreadPoolExecutor(3) as pool:
        rounds = [pool.submit(passes, ours, 16) for _ in range(24)]
        for done in rounds:
            assert all(torch.equal(a, b) for a, b in zip(done.result(), expected, strict=True))


def test_a_forked_process_has_helpers_of_its_own(shared_work: None) -> None:
    """Guards workers of data loaders and harnesses: threads do not survive a fork; waiting for
    them would never end."""
    product = native_linear(to_eight_bits(torch.randn(64, 32)))
    x = torch.randn(16, 32)
    torch.set_num_threads(2)
    expected = product(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(x), expected) else 1)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Guards the scale of a token: taken over more than one token, neighbours would change it."""
    ours = int8_model()
    prompts = random_ids(3, 12, seed=4)
    lengths = torch.tensor([12, 3, 7])
    together = ours.prefill(prompts, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = ours.prefill(prompts[row : row + 1, :length])
        assert torch.equal(ours.next_logits(alone)[0], ours.next_logits(together)[row])


@pytest.mark.parametrize("mode", MODES)
def test_texts_do_not_depend_on_the_batch(mode: str) -> None:
    """Guards decoding as a whole in int8."""
    prompts = [random_ids(length, seed=length).tolist() for length in (1, 7, 30)]
    values = {"mode": mode, "max_new_tokens": 18, "eos_token_id": 7}
    o = options_of({"steps_per_block": 3}, values)
    ours = int8_model()
    together = [row.tokens for row in generate(ours, prompts, o)]
    assert together == [generate(ours, [prompt], o)[0].tokens for prompt in prompts]


@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 40])
def test_speculative_texts_are_those_of_ar_at_every_block_size(block_size: int) -> None:
    """Guards against passes in other weights where a block is long: float32 drafts were verified
    by float32 passes under int8 heads, and 3 of 8 texts were not int8's."""
    ours = int8_model(block_size=40)
    prompts = [random_ids(length, seed=length).tolist() for length in (1, 5, 30, 70)]
    texts = {}
    for mode in ("ar", "speculative"):
        values = {"mode": mode, "max_new_tokens": 60, "eos_token_id": 7}
        o = options_of({"block_size": block_size}, values)
        texts[mode] = [row.tokens for row in generate(ours, prompts, o)]
    assert texts["speculative"] == texts["ar"]


def test_the_shipped_model_writes_the_same_at_every_block_size() -> None:
    """Guards the same on real text, where 3 of 8 differed at 32 tokens a block; the tests' random
    models decide by other margins."""
    plain, tokenizer = load_checkpoint(shipped_folder()), load_tokenizer(shipped_folder())
    ours = accelerate(plain, "native", "int8")
    prompts = list(SAMPLES.values())
    ar = GenerateOptions(mode="ar", max_new_tokens=48)
    expected = [row.text for row in generate(ours, prompts, ar, tokenizer=tokenizer)]
    for size in (8, 16, 24, 32, 40):
        o = GenerateOptions(mode="speculative", max_new_tokens=48, block_size=size)
        with warnings.catch_warnings(action="ignore"):  # larger than it was trained with
            found = [row.text for row in generate(ours, prompts, o, tokenizer=tokenizer)]
        assert found == expected, size


@pytest.mark.parametrize("length", [16, 24, 40, 300])
def test_long_passes_are_in_int8(length: int) -> None:
    """Guards consistency: one part of a text in float32 and another in int8 is a third model."""
    ours, plain = int8_model(), quantised_other()
    full = tiny_model(hybrid_override_pattern=DENSE)
    ids = random_ids(1, length, seed=3)
    view = plain.prefill(ids).view()
    for call in (
        lambda model: model.denoise(masked_like(ids), view, torch.tensor([0.75])),
        lambda model: model.context_head(model.verify(model.prefill(ids[:, :5]), ids).hidden),
        lambda model: model.next_logits(model.prefill(ids)),
    ):
        found, expected, other = call(ours), call(plain), call(full)
        # Tokens that round to the next whole number change what follows them a little.
        assert (found - expected).abs().mean() < 0.2 * (found - other).abs().mean()


def test_what_is_not_int8_says_so() -> None:
    """Guards figures: scores of float32 under the name of int8."""
    ours = int8_model()
    for call in (ours.context_logits, lambda ids: ours.training_logits(ids, ids, None, 4)):
        with pytest.raises(ValueError, match=r"uses the weights as loaded.*quantization=int8"):
            call(random_ids(1, 8))


def test_nan_is_not_hidden() -> None:
    """Guards the check for damaged weights: as a whole number, NaN would be one like any other."""
    names = ("layers.0.mixer.in_proj.weight", "layers.1.mixer.k_proj.weight", "norm_f.weight")
    for name in (*names, "layers.2.mixer.down_proj.weight"):
        plain = fresh_model(hybrid_override_pattern=DENSE).requires_grad_(False)
        plain.get_parameter(f"denoiser_tower.{name}")[0] = float("nan")
        ours = plain.with_backend(NativeBackend(plain, "int8"))
        logits = ours.denoise(
            masked_like(random_ids(1, 4)), ours.prefill(random_ids(1, 5)).view(), None
        )
        assert bool(logits.isnan().any()), name
    x = torch.zeros(2, 8)
    x[1, 3] = float("inf")
    found = native_linear(to_eight_bits(torch.ones(3, 8)))(x)
    assert not found[0].any() and bool(found[1].isnan().all())


def test_a_quantised_checkpoint_keeps_its_numbers() -> None:
    """Guards against rounding twice: numbers that were chosen once are the model, and its tokens
    have one scale each."""
    plain = copy.deepcopy(tiny_model(hybrid_override_pattern=DENSE, hidden_size=48))
    rounded = copy.deepcopy(plain)
    quantise_modules(rounded, INT8)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and weight_bits(f"{name}.weight", (), INT8):
            other = rounded.get_submodule(f"{name}.weight")
            matrix = to_eight_bits(module.weight)
            other.qdata.copy_(matrix.qdata), other.scale.copy_(matrix.scale)
    ours = accelerate(rounded, "native")
    for found, expected in zip(passes(ours, 16), passes(rounded, 16), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.02)
    other = accelerate(plain, "native", "int8")
    assert not torch.equal(passes(ours, 16)[0], passes(other, 16)[0])
    assert [w.shape for w in ours.buffers()] == [w.shape for w in rounded.buffers()]


def test_rows_that_are_too_long_are_one_line() -> None:
    """Guards the sums: beyond this, they leave an int32."""
    with pytest.raises(ValueError, match="a row of 70000 weights is too long"):
        native_linear(to_eight_bits(torch.zeros(1, 70_000)))


def test_the_command_line_hands_the_quantization_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a flag that is taken and forgotten: texts would be float32's, and right."""
    command = [
        "generate",
        "--mode",
        "ar",
        "--max-new-tokens",
        "2",
        "--quantization",
        "int8",
        "Q: 1",
    ]
    assert main([*command, "--backend", "eager"]) == 2
    assert "--quantization int8" in capsys.readouterr().err
    assert main(command) == 0
