"""The public door: what it accepts, what it refuses in one line, when rows end."""

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch

from tiny_models import MASK, fresh_model, prompts_of, tiny_model
from tiny_options import options_of
from tiny_text import WORDS, ids_of, tiny_tokenizer
from twotower import GenerateOptions, StepTaken, TokensCommitted, TwoTower, generate, memory, stream
from twotower.engine import MODES
from twotower.tokenizer import train_tokenizer

MODEL = tiny_model()
TOKENIZER = tiny_tokenizer()


def options(**changes: object) -> GenerateOptions:
    return options_of({"max_new_tokens": 8, "block_size": 4, "steps_per_block": 4}, changes)


def refusal(*arguments: Any) -> str:
    """The one line with which generate refuses, before any pass of the model."""
    with pytest.raises(ValueError) as error:
        generate(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty; give at least one token"),
        ("", "prompt 1 is empty; give at least one character"),
        ([5, MASK], "prompt 1 has the mask token 3"),
        ([5, 41], "prompt 1 has token 41 outside the vocabulary; use 0 to 40"),
        ([-1], "prompt 1 has token -1 outside the vocabulary; use 0 to 40"),
        ([5.7], "prompt 1 must be text or a list of whole token ids"),
        (["5"], "prompt 1 must be text or a list of whole token ids"),
        (None, "prompt 1 must be text or a list of whole token ids"),
        (b"5", "prompt 1 must be text or a list of whole token ids"),
        ({5, 6}, "prompt 1 must be text or a list of whole token ids"),
        ([True], "prompt 1 must be text or a list of whole token ids"),
        ("a\ud800", "the text is not UTF-8 text; correct or remove it"),
    ],
)
def test_unusable_prompts(prompt: object, message: str) -> None:
    assert message in refusal(MODEL, [[5], prompt], options(), TOKENIZER)


def test_unusable_calls() -> None:
    assert "must be a list of prompts" in refusal(MODEL, "abc", options(), TOKENIZER)
    assert "pass tokenizer=" in refusal(MODEL, ["abc"], options())
    assert "stop needs a tokenizer" in refusal(MODEL, [[5]], options(stop="a"))
    assert "2 given for 1 prompts" in refusal(MODEL, [[5]], [options(), options()])
    assert "eos_token_id=41 is outside" in refusal(MODEL, [[5]], options(eos_token_id=41))
    large = train_tokenizer(["abc"], vocab_size=260)
    assert "the tokenizer has 260 tokens and the model 41" in refusal(MODEL, ["a"], None, large)


def test_stream_checks_before_the_first_event() -> None:
    """Guards servers: a bad request must fail before an answer has begun."""
    with pytest.raises(ValueError, match="empty"):
        stream(MODEL, [[]], options())


def test_no_prompts_no_results() -> None:
    assert generate(MODEL, [], options()) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["context_lm_head.weight", "lm_head.weight"])
def test_nan_in_the_weights_is_one_line(mode: str, part: str) -> None:
    """Guards damaged checkpoints: argmax of NaN is a token, and such a text looks random."""
    broken = fresh_model()
    broken.state_dict()[part][7, 3] = float("nan")
    both = {"context_lm_head.weight", "lm_head.weight"}
    uses = {"ar": {"context_lm_head.weight"}, "speculative": both}.get(mode, {"lm_head.weight"})
    if part in uses:
        assert "logits are not finite" in refusal(broken, [[5, 6]], options(mode=mode))
    else:
        generate(broken, [[5, 6]], options(mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_a_tower_is_one_line(mode: str) -> None:
    broken = fresh_model()
    tower = "context_tower" if mode == "ar" else "denoiser_tower"
    broken.state_dict()[f"{tower}.layers.0.mixer.in_proj.weight"][0, 0] = float("nan")
    assert "check the checkpoint" in refusal(broken, [[5, 6]], options(mode=mode))


def test_a_prompt_larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the kernel's killer, which leaves no message at all."""
    prompt = prompts_of([3000])
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 100_000)

    def never(*arguments: object) -> None:
        raise AssertionError("the model must not be asked")

    monkeypatch.setattr(TwoTower, "prefill", never)
    message = refusal(MODEL, prompt, options())
    assert re.search(r"a prompt of 3000 tokens in 1 rows needs about .* GB .* shorten", message)


def test_memory_is_no_obstacle_where_it_suffices_or_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free in (None, 10**9):
        monkeypatch.setattr(memory, "available_bytes", lambda *_, free=free: free)
        assert len(generate(MODEL, [[5]], options())[0].tokens) == 8


@pytest.mark.filterwarnings("ignore:blocks of")
@pytest.mark.parametrize(("asked", "new", "block"), [(4096, 6, 6), (4096, 2, 4), (5, 8, 5)])
def test_a_block_is_no_longer_than_what_may_be_written(asked: int, new: int, block: int) -> None:
    """Guards minutes of passes over 4,096 positions for two tokens. The model's own size stays."""
    o = options(block_size=asked, max_new_tokens=new)
    events = list(stream(MODEL, [[5]], o))
    assert {len(e.tokens) for e in events if isinstance(e, StepTaken)} == {block}
    (same,) = generate(MODEL, [[5]], options(block_size=block, max_new_tokens=new))
    assert events[-1].completion == same


def test_blocks_larger_than_trained_warn_in_block_modes_alone() -> None:
    """Guards users against silent collapse; the warning points at their own line."""
    with pytest.warns(UserWarning, match="blocks of 8 tokens are larger than the 4") as seen:
        generate(MODEL, [[5], [6]], options(block_size=8))
    assert [one.filename for one in seen] == [__file__], "once, and at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(MODEL, [[5]], options(block_size=4))
        model = fresh_model()
        model.generation_defaults = {"block_size": 8}
        generate(model, [[5]], GenerateOptions(mode="ar", max_new_tokens=2))
        speculative = GenerateOptions(mode="speculative", block_size=8, max_new_tokens=8)
        generate(model, [[5]], speculative)  # AR's text all the same


def test_eos_of_the_configuration() -> None:
    """Guards the default: the checkpoint's, ignore_eos is none, several may end a row."""
    (free,) = generate(MODEL, [[5, 6]], options(mode="ar", temperature=1.0, max_new_tokens=12))
    first, second = free.tokens[4], free.tokens[7]
    for eos in (first, (first,), [second, first]):
        model = fresh_model(eos_token_id=list(eos) if isinstance(eos, tuple) else eos)
        ends = {eos} if isinstance(eos, int) else set(eos)
        end = next(i for i, token in enumerate(free.tokens) if token in ends) + 1
        o = options(mode="ar", temperature=1.0, max_new_tokens=12)
        (row,) = generate(model, [[5, 6]], o)
        assert (row.tokens, row.finish_reason) == (free.tokens[:end], "eos")
        (row,) = generate(model, [[5, 6]], dataclasses.replace(o, ignore_eos=True))
        assert row.tokens == free.tokens


def test_the_checkpoints_defaults_stand_behind_the_options() -> None:
    model = fresh_model()
    model.generation_defaults = {"max_new_tokens": 5, "mode": "ar", "temperature": 0.0}
    (row,) = generate(model, [[5, 6]])
    assert (len(row.tokens), row.nfe) == (5, 0)
    (row,) = generate(model, [[5, 6]], GenerateOptions(max_new_tokens=3))
    assert (len(row.tokens), row.nfe) == (3, 0)
    (row,) = generate(model, [[5, 6]], GenerateOptions(mode="mock-ar"))
    assert (len(row.tokens), row.nfe) == (5, 5)
    model.generation_defaults = {"temperature": -1.0}
    assert "generation_config.json: temperature=-1.0" in refusal(model, [[5]])


def test_text_prompts_begin_with_bos() -> None:
    """Guards the training format: a document begins with bos, so must a prompt of text."""
    texts = generate(MODEL, ["abc"], options(mode="ar"), TOKENIZER)
    ids = generate(MODEL, [[1, *TOKENIZER.encode("abc")]], options(mode="ar"), TOKENIZER)
    assert texts == ids
    assert texts[0].text == "".join(WORDS[t] for t in texts[0].tokens if t > MASK)


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_its_row_alone(mode: str) -> None:
    """Guards stop strings in every loop: cut inside a block, the other rows as without it."""
    prompts = prompts_of([4, 2, 9])
    o = [options(mode=mode, temperature=1.0, max_new_tokens=16, seed=s) for s in range(3)]
    free = generate(MODEL, prompts, o, TOKENIZER)
    text = free[1].text
    assert text is not None
    stop = text[7:10]  # crosses tokens
    o[1] = dataclasses.replace(o[1], stop=stop)
    cut = generate(MODEL, prompts, o, TOKENIZER)
    assert (cut[0], cut[2]) == (free[0], free[2])
    assert cut[1].finish_reason == "stop"
    assert cut[1].text == text[: text.index(stop)]
    assert cut[1].tokens == free[1].tokens[: len(cut[1].tokens)]
    shorter = TOKENIZER.decode(cut[1].tokens[:-1])
    assert stop not in shorter, "no token after the one that completes the stop"


def test_events_of_a_row_are_in_order() -> None:
    """Guards viewers: steps of a block, its commit, the next block; the end once, last."""
    events = [e for e in stream(MODEL, [[5], [6, 7]], options(), TOKENIZER) if e.row == 1]
    kinds = "".join(
        "s" if isinstance(e, StepTaken) else "c" if isinstance(e, TokensCommitted) else "f"
        for e in events
    )
    assert re.fullmatch(r"s+cs+cf", kinds)
    steps = [e for e in events if isinstance(e, StepTaken)]
    assert next(e.step for e in steps if e.block_index == 1) == 0


def test_prompts_may_be_any_sequence_of_numbers() -> None:
    expected = generate(MODEL, [[5, 6]], options())
    for prompt in ((5, 6), torch.tensor([5, 6]), range(5, 7)):
        assert generate(MODEL, [prompt], options()) == expected  # type: ignore[list-item]


def test_completion_leaves_the_prompt_out() -> None:
    (row,) = generate(MODEL, [ids_of("a", "b")], options(mode="ar", max_new_tokens=1), TOKENIZER)
    assert len(row.tokens) == 1
    assert row.text == TOKENIZER.decode(row.tokens)
