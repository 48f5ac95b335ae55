"""The ablations' interventions reach the denoiser, and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_models import MASK, random_ids, tiny_model
from twotower import GenerateOptions, generate
from twotower.engine import resolve_options
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model import ContextView


@pytest.fixture
def interventions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.ablations import interventions

    return interventions


class Recorder:
    """Stands for a model: keeps what `denoise` is given. It may favour the mask token."""

    def __init__(self, model, mask_bonus: float = 0.0) -> None:
        self.model = model
        self.mask_bonus = mask_bonus
        self.config = model.config
        self.given: list[tuple[Tensor, ContextView, Tensor | None]] = []

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        self.given.append((block, view, t))
        logits = self.model.denoise(block, view, t)
        logits[..., MASK] += self.mask_bonus
        return logits


def tensors(view: ContextView) -> list[Tensor]:
    return [part for state in view.layers if state is not None for part in state]


@pytest.mark.parametrize(("conv", "ssm"), [(True, True), (True, False), (False, True)])
def test_zero_seed(interventions, conv: bool, ssm: bool) -> None:
    """Guards against an ablation that changes nothing, or one that damages the cache for good."""
    model = tiny_model()
    cache = model.prefill(random_ids(2, 7))
    view = cache.view()
    before = [part.clone() for part in tensors(view)]
    recorder = Recorder(model)
    changed = interventions.Intervened(recorder, interventions.zero_seed(conv=conv, ssm=ssm))
    block, t = torch.full((2, 4), MASK), torch.ones(2)
    logits = changed.denoise(block, view, t)
    _, arrived, _ = recorder.given[0]
    for state, original in zip(arrived.layers, view.layers, strict=True):
        if isinstance(state, MambaState):
            assert bool((state.conv == 0).all()) == conv
            assert bool((state.ssm == 0).all()) == ssm
        else:
            assert state is original  # keys and values stay
    assert not torch.allclose(logits, model.denoise(block, view, t), atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(cache.view()), strict=True))


def test_hidden_keys(interventions) -> None:
    """The block's attention works without the context's keys, also with rows of other lengths."""
    model = tiny_model()
    view = model.prefill(random_ids(2, 7), torch.tensor([7, 5])).view()
    recorder = Recorder(model)
    changed = interventions.Intervened(recorder, interventions.hide_keys)
    changed.denoise(torch.full((2, 4), MASK), view, None)
    _, arrived, _ = recorder.given[0]
    for state, original in zip(arrived.layers, view.layers, strict=True):
        if isinstance(state, KV):
            assert state.k.shape[1] == state.v.shape[1] == 0
        else:
            assert state is original


@pytest.mark.parametrize("value", [0.5, None])
def test_frozen_t(interventions, value: float | None) -> None:
    recorder = Recorder(tiny_model())
    view = recorder.model.prefill(random_ids(2, 7)).view()
    changed = interventions.Intervened(recorder, interventions.freeze_t(value))
    changed.denoise(torch.full((2, 4), MASK), view, torch.tensor([1.0, 0.25]))
    t = recorder.given[0][2]
    assert t is None if value is None else t.tolist() == [value, value]


def test_guesses_stay(interventions) -> None:
    """A second pass sees the first one's guesses where the mask would stand, a new block masks."""
    recorder = Recorder(tiny_model(), mask_bonus=100.0)
    view = recorder.model.prefill(random_ids(1, 7)).view()
    model = interventions.GuessesStay(recorder)
    whole = torch.full((1, 4), MASK)
    first = model.denoise(whole, view, torch.ones(1))
    first[..., MASK] = -torch.inf
    model.denoise(torch.tensor([[MASK, 20, MASK, MASK]]), view, torch.tensor([0.75]))
    model.denoise(whole, view, torch.ones(1))
    guess = first.argmax(-1)[0].tolist()
    seen = [block[0].tolist() for block, _, _ in recorder.given]
    assert seen == [[MASK] * 4, [guess[0], 20, guess[2], guess[3]], [MASK] * 4]
    with pytest.raises(ValueError, match="batch size 1"):
        model.denoise(torch.full((2, 4), MASK), view, None)


def test_decoding_takes_an_intervened_model(interventions) -> None:
    """An intervention that changes nothing decodes as the model does: the measure of the others."""
    model = tiny_model()
    same = interventions.Intervened(model, lambda block, view, t: (block, view, t))
    prompts = [[5, 6, 7], [8, 9]]
    options = GenerateOptions(max_new_tokens=8)
    assert generate(same, prompts, options) == generate(model, prompts, options)


def test_the_control_decodes_as_published(interventions) -> None:
    """Silent failure: verification makes up for what is taken from the denoiser."""
    from benchmarks.ablations.sample import choose_options

    preferred = {"first_token": "context", "verify_threshold": 0.1, "confidence_threshold": 0.8}
    control = resolve_options(choose_options(0.95, 96)(), preferred)
    assert (control.first_token, control.verify_threshold) == ("denoiser", 0.0)
    assert control.confidence_threshold == 0.95
