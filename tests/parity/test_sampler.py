"""Every recorded run of the official mask-diffusion sampler, replayed with its fake denoiser.

The recording runs finished rows too and counts one pass for the whole batch; ours runs and
counts per row. Compared are therefore the rows still open, and the longest row's count.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tiny_sampler import RowSampler, sampler_of
from twotower.diffusion import Denoise, Step, denoise_block
from twotower.diffusion.loss import masked_loss_sum
from twotower.diffusion.noise import SCHEDULES, alpha, alpha_prime
from twotower.diffusion.scheduled import posterior_commit_probability

GOLDEN = Path(__file__).parent.parent / "golden" / "sampler"
RECORD = json.loads((GOLDEN / "golden_public.json").read_text())
MASK = RECORD["mask_token_id"]
VOCAB = RECORD["vocab_size"]
KINDS = {
    "confidence_unmasking": "confidence",
    "predict_and_noise": "predict-and-noise",
    "posterior": "posterior",
}


def fake_denoiser(gain: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The closed-form denoiser of the recording: tokens (R, T), t (R,) -> logits (R, T, V)."""

    def logits(tokens: Tensor, t: Tensor) -> Tensor:
        x = tokens.double()
        j = torch.arange(tokens.shape[1], dtype=torch.float64)
        v = torch.arange(VOCAB, dtype=torch.float64)
        h = ((j + 1) * (x + 1)).sum(-1).remainder(101)[:, None, None]
        place, word = (j + 1)[None, :, None], v[None, None, :]
        first = torch.sin(0.7 * (word + 1) * place + 0.31 * h)
        phase = 1.9 * t.double()[:, None, None] * (word + 1)
        second = torch.cos(0.43 * (word + 3) * (x[..., None] + 2) + phase)
        third = 0.8 * torch.sin(1.3 * (word + 1) + 0.17 * h * place)
        return (gain * (first + second + third)).float()

    return logits


def recorded_sampler(args: dict[str, Any], **changes: Any) -> RowSampler:
    """Our options for the recorded keyword arguments."""
    args = {**RECORD["defaults"], **args}
    if args["confidence_margin_based_noising"]:
        remask = "margin"
    else:
        remask = "confidence" if args["confidence_based_noising"] else "random"
    fields = dict(
        kind=KINDS[args["sampling_strategy"]],
        steps=args["num_steps"],
        threshold=args["confidence_threshold"],
        schedule=args["noise_schedule"],
        remask=remask,
        adaptive=args["adaptive_unmasking"],
        reuse_unchanged=args["use_model_output_cache"],
        mask_token_id=MASK,
    )
    return RowSampler(**{**fields, **changes})


def replay(case: dict[str, Any], **changes: Any) -> tuple[list[dict[str, Tensor]], list[Step]]:
    """Our run of a recorded case: the denoiser's inputs, and the steps."""
    calls: list[dict[str, Tensor]] = []
    fake = fake_denoiser(case["gain"])

    def denoise(tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        calls.append({"tokens": tokens, "t": t, "rows": rows})
        return fake(tokens, t)

    block = torch.tensor(RECORD["init_ids"][case["init"]])
    sampler = sampler_of(recorded_sampler(case["args"], **changes), len(block))
    seeds = [torch.Generator().manual_seed(row) for row in range(len(block))]
    return calls, list(denoise_block(denoise, block, sampler, seeds))


def case_id(case: dict[str, Any]) -> str:
    flags = "-".join(str(value) for value in case["args"].values())
    return f"{case['init']}-{case['gain']}-{flags}"


@pytest.mark.parametrize("case", RECORD["cases"], ids=case_id)
def test_recorded_case(case: dict[str, Any]) -> None:
    """Guards every sampler rule: a wrong count, order, t or reuse changes some recorded step."""
    calls, steps = replay(case)
    assert [step.tokens.tolist() for step in steps] == case["tokens_after_each_step"]
    assert steps[-1].tokens.tolist() == case["output"]
    assert int(steps[-1].nfe.max()) == case["nfe"] == len(calls)
    assert len(calls) == len(case["denoiser_calls"])
    for ours, recorded in zip(calls, case["denoiser_calls"], strict=True):
        tokens, t = torch.tensor(recorded["tokens"]), torch.tensor(recorded["t"])
        is_open = (tokens == MASK).any(-1)
        assert ours["rows"].tolist() == is_open.nonzero().flatten().tolist()
        assert torch.equal(ours["tokens"], tokens[is_open])
        # the recording subtracts in float32, ours in float64
        torch.testing.assert_close(ours["t"], t[is_open], rtol=0, atol=2e-7)


def reuse_for_whole_batch(denoise: Denoise) -> Denoise:
    """Skip a pass only if no token of any open row changed, as the recording does."""
    last: dict[str, Tensor] = {}

    def cached(tokens: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        if not last or not torch.equal(last["tokens"], tokens):
            last.update(tokens=tokens, logits=denoise(tokens, t, rows))
        return last["logits"]

    return cached


@pytest.mark.parametrize(
    ("gain", "schedule", "nfe"),
    [(1.2, "linear", [1, 1, 1]), (2.0, "cosine", [2, 2, 1]), (6.0, "cosine", [2, 2, 2])],
)
def test_reuse_depends_on_the_row_alone(gain: float, schedule: str, nfe: list[int]) -> None:
    """Guards against rows coupled by reuse: the recording repeats a pass of an unchanged row
    when a neighbour changed. Ours must equal the recorded rule applied to each row alone."""
    fake = fake_denoiser(gain)
    args = {"sampling_strategy": "posterior", "num_steps": 6, "noise_schedule": schedule}
    block = torch.tensor(RECORD["init_ids"]["mixed"])
    own = sampler_of(recorded_sampler(args), len(block))
    together = list(denoise_block(lambda x, t, _: fake(x, t), block, own))[-1]
    assert together.nfe.tolist() == nfe
    sampler = sampler_of(recorded_sampler(args, reuse_unchanged=False))
    for row in range(len(block)):
        calls: list[Tensor] = []

        def run(tokens: Tensor, t: Tensor, rows: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(tokens)
            return fake(tokens, t)

        alone = list(denoise_block(reuse_for_whole_batch(run), block[row : row + 1], sampler))[-1]
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert len(calls) == int(together.nfe[row])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: Any) -> None:
    t = torch.tensor(RECORD["schedules"]["t"], dtype=torch.float64)
    expected = RECORD["schedules"][schedule]
    for ours, name in ((alpha(schedule, t), "alpha"), (alpha_prime(schedule, t), "alpha_prime")):
        recorded = torch.tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(ours, recorded, rtol=0, atol=1e-14)


def test_loss() -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    logits, labels, masked = (golden[f"loss/{name}"] for name in ("logits", "labels", "masked"))
    loss = masked_loss_sum(logits, labels, masked.bool())
    mean = loss / masked.sum()
    torch.testing.assert_close(mean, golden["loss/value"][0], rtol=1e-6, atol=0)
    nothing = masked_loss_sum(logits, labels, torch.zeros_like(masked).bool())
    assert nothing == golden["loss/value_without_masks"][0] == 0


def test_posterior() -> None:
    """The recorded posterior is (chance to commit) times p(v), and the rest on the mask."""
    golden = load_file(GOLDEN / "golden.safetensors")
    x_theta, recorded = golden["posterior/x_theta"], golden["posterior/q_alpha_t0.3_alpha_s0.5"]
    chance = posterior_commit_probability(torch.tensor(0.3), torch.tensor(0.5))
    ours = x_theta * chance
    ours[..., MASK] = 1 - chance
    torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-7)


def test_constrained_probabilities() -> None:
    """Confidence is the recorded probability with the mask token excluded; given tokens stay."""
    golden = load_file(GOLDEN / "golden.safetensors")
    logits, tokens, recorded = (golden[f"mdlm/{name}"] for name in ("logits", "xt", "log_probs"))
    sampler = sampler_of(RowSampler(steps=1, mask_token_id=MASK), len(tokens))
    (step,) = denoise_block(lambda x, t, rows: logits, tokens, sampler)
    best = recorded.max(-1)
    assert torch.equal(step.tokens, best.indices)
    torch.testing.assert_close(step.confidence, best.values.exp(), rtol=1e-5, atol=0)
