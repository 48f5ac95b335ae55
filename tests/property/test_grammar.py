"""Grammars: the text is that of mode="ar" under the same grammar, parses, and validates."""

import itertools
import json

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import MASK, random_ids, tiny_model
from tiny_options import options_of
from tiny_text import byte_tokenizer
from twotower import Completion, ContextView, GenerateOptions, TokensCommitted, generate, stream
from twotower.engine import Failed, Finished, Request, stream_requests
from twotower.engine.grammar import Grammar, json_schema, lark, regex
from twotower.engine.grammar_state import GrammarState, TokenRules, begin
from twotower.model.backend import PassCosts
from twotower.model.eager import EagerBackend
from twotower.serve.tool_calls import read_tool_calls, tool_call

EOS, VOCAB = 2, byte_tokenizer().vocab_size
MODEL = tiny_model(vocab_size=VOCAB, block_size=6)
PROMPT = random_ids(9, seed=4).tolist()
FREE = PassCosts({1: 1000.0, 64: 1.0}, row=0.0)  # passes: drafts never pause
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 40},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
SPELT = {
    token: byte_tokenizer().token_bytes(token)
    for token in range(VOCAB)
    if token not in byte_tokenizer().special_ids
}
ENDS = (b",", b"}", b"]")
GRAMMARS = {
    "schema": json_schema(SCHEMA),
    "regex": regex("(ab|ba|\u00e9){3,9}"),
    "lark": lark('start: item ("," item)*\nitem: /[0-9]{1,3}/ | "x" start "y"'),
    "tools": tool_call(TOOLS, "required"),
}


def options(mode: str, grammar: Grammar | None, **changes: object) -> GenerateOptions:
    values = {"mode": mode, "grammar": grammar, "eos_token_id": EOS} | changes
    return options_of({"max_new_tokens": 45}, values)


def complete(mode: str, grammar: Grammar | None, **changes: object) -> Completion:
    return generate(MODEL, [PROMPT], options(mode, grammar, **changes), byte_tokenizer())[0]


def walk(grammar: Grammar, tokens: list[int]) -> GrammarState:
    """The state after tokens, each of which it must have allowed."""
    rules = TokenRules(eos=(EOS,), mask_token_id=MASK, vocab_size=VOCAB)
    state = begin(grammar, byte_tokenizer(), rules)
    for place, token in enumerate(tokens):
        assert state.mask()[token], f"token {place} is forbidden"
        if token == EOS:
            assert place == len(tokens) - 1
            break
        state.follow(tokens[: place + 1])
    return state


def greedy_by_hand(grammar: Grammar, length: int) -> list[int]:
    """AR decoding by the definition: each time the most probable of the allowed tokens, each with
    all forbidden ones of which it is the longest allowed beginning, or that end a value of JSON
    where another character must.
    """
    rules = TokenRules(eos=(EOS,), mask_token_id=MASK, vocab_size=VOCAB)
    state, tokens = begin(grammar, byte_tokenizer(), rules), []
    is_json = grammar.kind in ("json_schema", "tool_call")
    while len(tokens) < length:
        with torch.no_grad():
            logits = MODEL.context_logits(torch.tensor([PROMPT + tokens]))[0, -1]
        allowed = state.mask().nonzero().flatten().tolist()
        probs = logits.double().softmax(-1).tolist()
        totals = {token: probs[token] for token in allowed}
        for token in set(SPELT) - set(allowed):
            written = [one for one in allowed if one in SPELT and SPELT[one].strip()]
            if heirs := [one for one in written if SPELT[token].startswith(SPELT[one])]:
                totals[max(heirs, key=lambda one: len(SPELT[one]))] += probs[token]
            elif is_json and SPELT[token][:1] in ENDS:
                after = [one for end in ENDS for one in written if SPELT[one] == end]
                for one in after[:1]:
                    totals[one] += probs[token]
        tokens.append(max(totals, key=totals.__getitem__))
        if tokens[-1] == EOS:
            break
        state.follow(tokens)
    return tokens


@pytest.mark.parametrize("name", GRAMMARS)
def test_greedy_ar_is_the_best_allowed_token(name: str) -> None:
    """Guards the mask itself: a token that is allowed but not the best of them is no greedy text,
    and the unmasked choice may only stand where it is allowed."""
    grammar = GRAMMARS[name]
    assert grammar is not None
    found = complete("ar", grammar, max_new_tokens=25)
    assert found.tokens == greedy_by_hand(grammar, 25)


class Drafter:
    """In place of the denoiser: the right continuation, with some tokens wrong."""

    def __init__(self, text: list[int], wrong: dict[int, int]) -> None:
        self._text, self._wrong = text, wrong

    def __call__(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        lengths = torch.full((len(block),), view.num_past) if view.lengths is None else view.lengths
        logits = torch.zeros(*block.shape, VOCAB)
        for row, column in itertools.product(*map(range, block.shape)):
            at = int(lengths[row]) - len(PROMPT) + column
            token = self._text[at] if at < len(self._text) else 9
            logits[row, column, self._wrong.get(at, token)] = 20.0
        return logits


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(GRAMMARS)),
    wrong=st.dictionaries(st.integers(0, 30), st.integers(4, VOCAB - 1), max_size=8),
    temperature=st.sampled_from([0.0, 1.0]),
    cut=st.sampled_from([{}, {"top_k": 9}, {"top_p": 0.6}]),
    seed=st.integers(0, 50),
)
def test_any_draft_gives_the_text_of_ar(
    name: str, wrong: dict[int, int], temperature: float, cut: dict[str, object], seed: int
) -> None:
    """Guards verification from left to right: a mask of the wrong place, or a state that keeps a
    rejected draft, gives another text, or one that no longer fits the grammar."""
    grammar, shape = GRAMMARS[name], {"temperature": temperature, "seed": seed, **cut}
    assert grammar is not None
    expected = complete("ar", grammar, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "pass_costs", FREE)
        patch.setattr(MODEL, "denoise", Drafter(expected.tokens, wrong))
        found = complete("speculative", grammar, **shape)
    assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    state = walk(grammar, found.tokens)
    if found.finish_reason == "length":  # white space is free, and the model is random
        return
    assert state.mask()[EOS]
    assert found.text is not None
    if name == "schema":
        jsonschema.validate(json.loads(found.text), SCHEMA)
    if name == "tools":
        (call,) = read_tool_calls(found.text).calls
        assert call.name in ("get", "stop")
        jsonschema.validate(json.loads(call.arguments), SCHEMA if call.name == "get" else {})


def test_right_drafts_save_passes() -> None:
    """Guards the gain: under a grammar a draft that is right is still taken whole."""
    expected = complete("ar", GRAMMARS["schema"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODEL, "denoise", Drafter(expected.tokens, {}))
        found = complete("speculative", GRAMMARS["schema"])
    assert found.tokens == expected.tokens
    # the prompt gives 1 token, each cycle a block of them
    assert found.context_forwards == 1 + -(-(len(found.tokens) - 1) // 6)


def test_what_the_grammar_demands_is_drafted() -> None:
    """Guards the gain where a model drafts badly: the fixed parts of a call need no denoiser."""
    fixed = regex("[ab]the secret: 0123456789[ab]")
    expected = complete("ar", fixed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "pass_costs", FREE)
        patch.setattr(MODEL, "denoise", Drafter([], {}))
        found = complete("speculative", fixed)
    assert found.tokens == expected.tokens
    assert found.finish_reason == "eos"
    assert found.context_forwards < 0.5 * expected.context_forwards


def test_what_is_demanded_is_read_at_once_while_drafts_pause() -> None:
    """Guards the gain where drafts do not pay: fixed parts take no denoiser and few passes."""
    fixed = regex("[ab]{20}the secret: 0123456789")
    expected = complete("ar", fixed, max_new_tokens=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODEL, "denoise", Drafter([], {}))
        found = complete("speculative", fixed, max_new_tokens=60)
    assert (found.tokens, found.finish_reason) == (expected.tokens, "eos")
    assert found.nfe < 10, "drafting pauses"
    num_fixed = len(found.tokens) - 20
    assert found.context_forwards < 22 + num_fixed / 2


def test_a_draft_beyond_the_end_is_not_followed() -> None:
    """Guards a row that ends at a token of its own, which its grammar does not know."""
    letter = byte_tokenizer().encode("b")[0]
    expected = complete("ar", regex("[ac]{2,4}"), eos_token_id=letter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODEL, "denoise", Drafter(expected.tokens, {}))
        found = complete("speculative", regex("[ac]{2,4}"), eos_token_id=letter)
    assert (found.tokens, found.finish_reason) == (expected.tokens, "eos")


def test_no_more_of_a_draft_is_read_than_could_be_accepted() -> None:
    """Guards the cost of reading what the grammar rules out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "pass_costs", FREE)
        patch.setattr(MODEL, "denoise", Drafter([], {}))  # drafts one control character
        o = options("speculative", regex("[ab]{40}"), drafts="denoiser")
        events = list(stream(MODEL, [PROMPT], o, byte_tokenizer()))
    drafted = [event.drafted for event in events if isinstance(event, TokensCommitted)]
    assert drafted[0] is None
    assert set(drafted[1:-1]) == {1}, "the newest token and the forbidden one"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_keep_their_own_grammar(temperature: float) -> None:
    """Guards batches in which rows have different grammars, or none, with the real denoiser."""
    grammars = [*GRAMMARS.values(), None, GRAMMARS["schema"]]
    prompts = [random_ids(3 + i, seed=i).tolist() for i in range(len(grammars))]
    shape = {"temperature": temperature, "seed": 5, "max_new_tokens": 40}
    results = {
        mode: generate(
            MODEL, prompts, [options(mode, g, **shape) for g in grammars], byte_tokenizer()
        )
        for mode in ("ar", "speculative")
    }
    assert [r.tokens for r in results["speculative"]] == [r.tokens for r in results["ar"]]
    for grammar, row in zip(grammars, results["ar"], strict=True):
        if grammar is not None:
            walk(grammar, row.tokens)
    alone = generate(MODEL, [prompts[4]], options("ar", None, **shape), byte_tokenizer())[0]
    assert results["ar"][4].tokens == alone.tokens


VALUES = st.one_of(
    st.builds(lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
              st.integers(-200, 200), st.integers(0, 50)),
    st.builds(lambda values: {"enum": values}, st.lists(
        st.one_of(st.text(max_size=4), st.booleans(), st.none(), st.integers(-99, 99)),
        min_size=1, max_size=3, unique_by=repr)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.just({"type": "boolean"}),
)  # fmt: skip


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, object]:
    """Schemas of short values."""
    names = draw(st.lists(st.sampled_from(["a", "b c", "\u00e9", '"']), max_size=3, unique=True))
    properties = {name: draw(VALUES) for name in names}
    inner = {"type": "object", "properties": properties, "additionalProperties": False}
    inner["required"] = [name for name in names if draw(st.booleans())]
    count = draw(st.integers(0, 2))
    listed = {"type": "array", "items": inner, "minItems": count, "maxItems": 2}
    return draw(st.sampled_from([inner, listed, {"anyOf": [{"type": "null"}, inner]}]))


@settings(max_examples=12)
@given(schema=schemas(), seed=st.integers(0, 99), mode=st.sampled_from(["ar", "speculative"]))
def test_what_is_finished_parses_and_validates(
    schema: dict[str, object], seed: int, mode: str
) -> None:
    """Guards the promise to clients, which parse without asking: whatever a (random) model wants
    to say, a text that ends by itself is JSON of the schema, and one that is cut says so."""
    found = complete(mode, json_schema(schema), temperature=1.0, seed=seed, max_new_tokens=60)
    assert found.text is not None
    if found.finish_reason == "eos":
        jsonschema.validate(json.loads(found.text), schema)
    else:
        assert found.finish_reason == "length"
        walk(json_schema(schema), found.tokens)


def test_what_is_cut_says_so() -> None:
    found = complete("ar", GRAMMARS["schema"], max_new_tokens=5)
    assert (found.finish_reason, len(found.tokens)) == ("length", 5)


def test_a_grammar_that_the_model_cannot_finish_fails_alone() -> None:
    """Guards neighbours of a row whose grammar leads nowhere."""
    dead_end = lark('start: "a" <mask>')
    requests = [
        Request(PROMPT, options("speculative", grammar, max_new_tokens=8))
        for grammar in (None, dead_end, GRAMMARS["regex"])
    ]
    ends = {
        event.row: event
        for event in stream_requests(MODEL, requests, byte_tokenizer())
        if isinstance(event, Failed | Finished)
    }
    assert [type(ends[row]) for row in range(3)] == [Finished, Failed, Finished]


@pytest.mark.parametrize("mode", ["diffusion", "posterior", "predict-and-noise", "mock-ar"])
def test_modes_that_keep_no_grammar_refuse_it(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode='{mode}' .*use mode='speculative' or 'ar'"):
        complete(mode, GRAMMARS["schema"])


def test_what_a_grammar_needs() -> None:
    with pytest.raises(ValueError, match="grammar needs a tokenizer"):
        generate(MODEL, [PROMPT], options("ar", GRAMMARS["schema"]))
    with pytest.raises(ValueError, match="grammar needs a token that ends the text"):
        complete("ar", GRAMMARS["schema"], eos_token_id=None, ignore_eos=True)
    with pytest.raises(ValueError, match="json_schema: Invalid type"):
        complete("ar", json_schema({"type": "thing"}))


@pytest.mark.parametrize(("padding", "mask"), [(300, MASK), (0, VOCAB), (300, VOCAB + 300)])
def test_a_model_may_have_more_tokens_than_its_tokenizer(padding: int, mask: int) -> None:
    """Guards the tokens beyond, of which the library must not be asked, and masks past the last:
    no schema could be asked of a Llama whose vocabulary is its tokenizer's."""
    model = tiny_model(vocab_size=VOCAB + padding, mask_token_id=mask)
    grammar = regex("[ab]{30}")
    for mode in ("ar", "speculative"):
        (found,) = generate(model, [PROMPT], options(mode, grammar), byte_tokenizer())
        assert found.text is not None and len(found.text) == 30
