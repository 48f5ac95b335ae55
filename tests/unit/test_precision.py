"""Which weights are narrowed, as a list, and what a scheme may be."""

from collections.abc import Callable

import pytest
import torch

from tiny_quantised import SCHEMES, groupable_model
from twotower.backends import accelerate
from twotower.checkpoint import names
from twotower.layers.quantised import QuantisedMatrix
from twotower.model.precision import Scheme, quantise_modules, scheme_of, weight_bits

# Layer pattern M*E-M*: the first of each kind. What is not here stays in full precision.
NARROW = {
    "layers.0.mixer.in_proj.weight": 4,
    "layers.0.mixer.out_proj.weight": 4,
    "layers.1.mixer.q_proj.weight": 4,
    "layers.1.mixer.k_proj.weight": 4,
    "layers.1.mixer.v_proj.weight": 4,
    "layers.1.mixer.o_proj.weight": 4,
    "layers.2.mixer.experts.up_proj": 4,
    "layers.2.mixer.experts.down_proj": 4,
    "layers.2.mixer.shared_experts.up_proj.weight": 4,
    "layers.2.mixer.shared_experts.down_proj.weight": 4,
    "layers.3.mixer.up_proj.weight": 4,
    "layers.3.mixer.down_proj.weight": 4,
    "layers.4.mixer.in_proj.weight": 4,
    "layers.4.mixer.out_proj.weight": 4,
    "layers.5.mixer.q_proj.weight": 4,
    "layers.5.mixer.k_proj.weight": 4,
    "layers.5.mixer.v_proj.weight": 4,
    "layers.5.mixer.o_proj.weight": 4,
}
HEADS = {"context_lm_head.weight": 8, "lm_head.weight": 8}


def expected_bits() -> dict[str, int]:
    towers = ("context_tower", "denoiser_tower")
    return HEADS | {f"{tower}.{name}": bits for tower in towers for name, bits in NARROW.items()}


def found_bits(scheme: Scheme) -> dict[str, int]:
    tensors = groupable_model().state_dict()
    bits = {name: weight_bits(name, tensor.shape, scheme) for name, tensor in tensors.items()}
    return {name: value for name, value in bits.items() if value is not None}


def test_what_int4_narrows_is_this_list() -> None:
    """Guards time conditioning, routers, norms, convolutions, A, D, dt, embeddings: each of them in
    4 bits spoils diffusion or the choice of experts, and no shape says so."""
    assert found_bits(SCHEMES["int4"]) == expected_bits()
    assert found_bits(SCHEMES["int8"]) == dict.fromkeys(expected_bits(), 8)


def test_rows_that_are_no_whole_groups_have_8_bits() -> None:
    name = "context_tower.layers.1.mixer.q_proj.weight"
    assert weight_bits(name, (8, 96), SCHEMES["int4"]) == 4
    assert weight_bits(name, (8, 96), SCHEMES["int4-64"]) == 8


def test_the_gate_of_an_mlp_is_quantised_and_that_of_experts_is_not() -> None:
    """Guards two names that begin alike: a third of a Llama model, and a router."""
    layer = "context_tower.layers.1.mixer"
    assert weight_bits(f"{layer}.gate_proj.weight", (8, 64), SCHEMES["int4"]) == 4
    assert weight_bits(f"{layer}.gate.weight", (8, 64), SCHEMES["int4"]) is None


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_the_model_and_the_file_have_one_rule(scheme: Scheme) -> None:
    """Guards a file whose experts are quantised otherwise than the model that is to read them."""
    model = groupable_model()
    full = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    quantise_modules(model, scheme)
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedMatrix)}
    for released, slot in names.released_slots(full).items():
        bits = weight_bits(released, slot.shape, scheme)
        assert bits == weight_bits(slot.parameter, full[slot.parameter], scheme)
        holder = quantised.get(slot.parameter)
        assert bits == (None if holder is None else holder.bits), released
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert scheme_of(model) == scheme


def test_a_shared_head_stays_in_full_precision_with_the_embeddings() -> None:
    model = groupable_model(tie_word_embeddings=True)
    quantise_modules(model, SCHEMES["int8"])
    assert model.lm_head.weight is model.denoiser_tower.embeddings.weight  # type: ignore[union-attr]
    assert scheme_of(model) == SCHEMES["int8"]


def test_full_precision_models_have_no_scheme() -> None:
    assert scheme_of(groupable_model()) is None


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Scheme(weights="int3"), "weights='int3' is unknown"),  # type: ignore[arg-type]
        (lambda: Scheme(weights="int4", group_size=48), "group_size=48 must be 32, 64 or 128"),
        (lambda: Scheme(weights="int4", group_size=0), "group_size=0 must be"),
        (lambda: Scheme(weights="int4", group_size=True), "group_size=True must be"),
        (lambda: Scheme(weights="int8", group_size=32), "int8 weights have no groups"),
        (lambda: Scheme(weights="int4", activations="int8"), "needs weights=int8"),
        (lambda: Scheme(weights="int8", activations="int4"), "is unknown"),  # type: ignore[arg-type]
    ],
)
def test_schemes_that_do_not_exist(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()


def test_native_passes_leave_quantised_models_alone() -> None:
    """Guards a native pass that finds no weights, or full-precision ones that are not there."""
    model = groupable_model(hybrid_override_pattern="M*-", num_hidden_layers=3)
    quantise_modules(model, SCHEMES["int8"])
    assert accelerate(model) is model
    with pytest.raises(ValueError, match="quantization=int8"):
        accelerate(model, "native")


def test_gradients_are_not_asked_of_8_bits() -> None:
    """Guards training that would move only what is in full precision."""
    model = groupable_model(dtype=torch.bfloat16)
    quantise_modules(model, SCHEMES["int8"])
    logits = model.context_logits(torch.tensor([[5, 6, 7]]))
    assert not logits.requires_grad
