"""A model's vocabulary may be larger than its tokenizer's: what is no token is never written."""

import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers

from tiny_models import tiny_model
from tiny_text import byte_tokenizer
from twotower import GenerateOptions, Tokenizer, TwoTower, generate, load_model
from twotower.checkpoint import save_backbone, save_two_towers
from twotower.engine import MODES, Failed, Mode, Request, Worker
from twotower.engine.grammar import regex

PADDED = 448  # ids of the model
NUM = byte_tokenizer().vocab_size  # the hole, and what stood there comes behind it
PROMPT = "the secret"


@cache
def holed() -> Tokenizer:
    """The byte-level tokenizer with an id that is no token before its last one."""
    values = json.loads(byte_tokenizer().json_text)
    vocab = values["model"]["vocab"]
    (last,) = [text for text, number in vocab.items() if number == NUM - 1]
    vocab[last] = NUM
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)))


@cache
def padded() -> TwoTower:
    return tiny_model(vocab_size=PADDED)


def options(mode: Mode, **changes: object) -> GenerateOptions:
    values: dict[str, object] = {"temperature": 50.0, "ignore_eos": True, "max_new_tokens": 60}
    return GenerateOptions(mode=mode, **{**values, **changes})  # type: ignore[arg-type]


def test_the_ids_that_are_no_token() -> None:
    assert holed().unused_ids(PADDED) == (NUM - 1, *range(NUM + 1, PADDED))
    assert byte_tokenizer().unused_ids(NUM) == ()


@pytest.mark.parametrize("mode", MODES)
def test_only_tokens_are_written(mode: Mode) -> None:
    """Guards against a padded id that is sampled, which no tokenizer can turn into text: it ended
    all prompts of a call. At this temperature every third id would be one."""
    seeds = [options(mode, seed=seed) for seed in range(3)]
    found = generate(padded(), [PROMPT] * 3, seeds, holed())
    for row in found:
        assert len(row.tokens) == 60 and row.text is not None
        assert not set(row.tokens) & set(holed().unused_ids(PADDED))


@pytest.mark.parametrize("mode", ["ar", "speculative", "diffusion"])
def test_alternatives_are_tokens(mode: Mode) -> None:
    """Guards answers with log-probabilities, whose alternatives have texts as well."""
    verified = {"first_token": "context", "verify_threshold": 0.001} if mode == "diffusion" else {}
    o = options(mode, logprobs=100, max_new_tokens=8, **verified)
    (row,) = generate(padded(), [PROMPT], o, holed())
    assert row.logprobs is not None
    for one in row.logprobs:
        ids = [token for token, _ in one.top]
        assert len(ids) == 100 and not set(ids) & set(holed().unused_ids(PADDED))


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_under_a_grammar(mode: Mode) -> None:
    o = options(mode, grammar=regex("[a-z ]{20}"), ignore_eos=None, eos_token_id=2)
    (row,) = generate(padded(), [PROMPT], o, holed())
    assert row.text is not None and len(row.text) == 20


def test_in_a_worker() -> None:
    """Guards a served request, which ended with an internal error."""
    worker = Worker(padded(), holed())
    worker.start()
    tickets = [worker.submit(Request(PROMPT, options(mode, seed=7))) for mode in MODES]
    events = [event for ticket in tickets for event in ticket.events()]
    worker.stop()
    assert not [event for event in events if isinstance(event, Failed)]


@pytest.mark.parametrize("has_denoiser", [True, False])
def test_a_loaded_model_knows_without_its_tokenizer(has_denoiser: bool, tmp_path: Path) -> None:
    """Guards callers who pass ids and decode the answer themselves."""
    save = save_two_towers if has_denoiser else save_backbone
    save(padded(), tmp_path / "model", extra_files=holed().files())
    model = load_model(tmp_path / "model")
    (row,) = generate(model, [[5, 6]], options("ar"))
    assert model.unused_ids == holed().unused_ids(PADDED)
    assert not set(row.tokens) & set(model.unused_ids)
