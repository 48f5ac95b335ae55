"""A script recorded on one model and repeated on another: same passes, same commits."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import tiny_options
from tiny_models import fresh_model, prompts_of, tiny_config, tiny_model
from twotower import GenerateOptions
from twotower.checkpoint.empty import build_empty
from twotower.engine import Finished, StepTaken, TokensCommitted, stream
from twotower.families import config_to_dict
from twotower.lab.bench import replay
from twotower.lab.bench.replay import (
    Script,
    ScriptedModel,
    logit_of,
    make_random,
    random_config,
    record_script,
)
from twotower.lab.bench.runners import OurRunner, TimedPrompt
from twotower.model import ContextCache, ContextView, TwoTower

PROMPT = prompts_of([7])[0]


def options_of(mode: str) -> GenerateOptions:
    verified = {"mode": "diffusion", "first_token": "context", "verify_threshold": 0.02}
    own = verified if mode == "verified" else {"mode": mode}
    values: dict[str, object] = {"max_new_tokens": 23, "ignore_eos": True, "drafts": "denoiser"}
    return tiny_options.options_of(values | {"block_size": 4, "confidence_threshold": 0.6}, own)


def script_of(model: TwoTower, mode: str) -> Script:
    return record_script(stream(model, [PROMPT], options_of(mode)))


@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified", "speculative"])
@pytest.mark.parametrize("seed", [0, 1, 5])  # none chooses the mask token, which is drafted anew
def test_another_model_repeats_the_commits(mode: str, seed: int) -> None:
    """Silent failure: a random model commits at a pace of its own, and its cost is not the
    recorded one.
    """
    script = script_of(tiny_model(seed), mode)
    other = fresh_model(seed + 7, hidden_size=24, vocab_size=90)
    scripted = ScriptedModel(other, script)
    repeated = record_script(
        stream(scripted, [PROMPT], options_of(mode))  # type: ignore[arg-type]
    )
    assert repeated.commits == script.commits and sum(script.commits) == 23
    assert repeated.nfe == script.nfe
    for mine, theirs in zip(repeated.confidences, script.confidences, strict=True):
        assert len(mine) == len(theirs)
    if mode == "diffusion":
        assert 6 < script.nfe < 24  # neither all at once nor one by one: the script matters


def test_accepted_drafts_are_repeated() -> None:
    """Random towers hardly ever agree, so that this script is written by hand: 4 stand at most, and
    never so few that drafting pauses."""
    script = Script(confidences=[[0.9, 0.9, 0.9]] * 5, commits=[1, 4, 4, 3, 4, 1])
    options = dataclasses.replace(options_of("speculative"), max_new_tokens=script.num_tokens)
    scripted = ScriptedModel(tiny_model(), script)
    repeated = record_script(stream(scripted, [PROMPT], options))  # type: ignore[arg-type]
    assert repeated.commits == script.commits and repeated.nfe <= 5


def test_without_a_script_the_other_model_differs() -> None:
    """Guards the test above: equal counts by chance would prove nothing."""
    own = [script_of(fresh_model(seed + 7, vocab_size=90), "diffusion").nfe for seed in range(3)]
    assert own != [script_of(tiny_model(seed), "diffusion").nfe for seed in range(3)]


class Counting:
    """Counts what really reaches the towers."""

    def __init__(self, model: TwoTower) -> None:
        self.model = model
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> object:
        self.calls[name] = self.calls.get(name, 0) + 1
        return getattr(self.model, name)

    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        self.calls["denoise"] = self.calls.get("denoise", 0) + 1
        return self.model.denoise(block, view, t)


def test_the_towers_compute_every_pass() -> None:
    """Silent failure: replaced logits that cost nothing make a big model look fast."""
    script = script_of(tiny_model(), "diffusion")
    counting = Counting(tiny_model(1))
    runner = OurRunner("eager", counting, options_of("diffusion"))  # type: ignore[arg-type]
    one = runner.run(TimedPrompt(ids=PROMPT, max_new_tokens=99, scripts={"diffusion": script}))
    assert counting.calls["denoise"] == one.nfe == script.nfe
    assert counting.calls["extend"] == len(script.commits)  # the prompt, all blocks but the last
    assert len(one.tokens) == 23  # the script's, not the prompt's


def test_what_is_recorded() -> None:
    step = StepTaken(
        row=0, block_index=0, step=0, t=1.0, tokens=[3, 5], is_masked=[True, False],
        confidence=[0.25, 0.75], nfe=1,
    )  # fmt: skip
    commit = TokensCommitted(
        row=0, block_index=0, tokens=[4, 5], text="", nfe=1, context_forwards=1
    )
    script = record_script([step, step, commit])
    assert script == Script(confidences=[[0.25, 0.75]] * 2, commits=[2], num_unread=0)
    assert (script.num_tokens, script.nfe) == (2, 2)


@pytest.mark.parametrize("confidence", [0.2, 0.5, 0.95])
def test_a_logit_gives_its_confidence(confidence: float) -> None:
    logits = torch.zeros(10)
    logits[3] = -math.inf  # the mask token
    logits[4] = logit_of(confidence, 10)
    assert logits.softmax(-1)[4].item() == pytest.approx(confidence, rel=1e-5)


def test_a_confidence_below_chance_still_predicts() -> None:
    """Silent failure: a large vocabulary's low confidence leads to another token in a small one."""
    assert logit_of(0.0, 10) > 0 and math.isfinite(logit_of(1.0, 10))


def test_choices_stand_as_recorded() -> None:
    model = tiny_model()
    scripted = ScriptedModel(model, Script(confidences=[], commits=[1, 3, 1, 4]))
    hidden = torch.zeros(1, 4, model.config.hidden_size)
    found = [scripted.context_head(hidden).argmax(-1)[0].tolist() for _ in range(3)]
    assert found == [[4, 4, 5, 4], [5, 4, 4, 4], [4, 4, 4, 5]]
    cache: ContextCache = model.prefill(torch.tensor([PROMPT]))
    assert scripted.next_logits(cache).argmax(-1).tolist() == [4]
    assert scripted.config is model.config


def test_the_last_event_is_the_rows_end() -> None:
    """What `time_stream` reads its result from."""
    *_, last = stream(tiny_model(), [PROMPT], options_of("ar"))
    assert isinstance(last, Finished)


def test_random_models_have_the_sizes_of_their_names() -> None:
    """Silent failure: a row of the table is called 160M and streams something else."""
    for size, wanted in (("32M", 32e6), ("160M", 160e6)):
        config = random_config(size, block_size=16)
        model = build_empty(config, "context")
        count = sum(parameter.numel() for parameter in model.parameters())
        assert abs(count / wanted - 1) < 0.03
        assert config.eos_token_ids == () and config.block_size == 16
    assert (config.hidden_size, config.context.num_layers) == (1024, 24)


def test_random_models_repeat_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = config_to_dict(tiny_config())
    monkeypatch.setitem(replay.SIZES, "32M", tiny)
    one, same, other = (make_random("32M", tiny_model(), seed) for seed in (3, 3, 4))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert torch.equal(one.lm_head.weight, one.context_lm_head.weight)
    assert not any(parameter.requires_grad for parameter in one.parameters())
