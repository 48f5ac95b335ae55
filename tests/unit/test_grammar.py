"""Grammars: which tokens they allow where, what they refuse, and how they are taken back."""

import json
import resource
import time

import pytest
import tokenizers
import torch

from tiny_models import MASK
from tiny_text import byte_tokenizer, tiny_tokenizer
from twotower.engine import grammar_builder
from twotower.engine.fork_server import Forked
from twotower.engine.grammar import Grammar, GrammarFailed, json_schema, lark, regex
from twotower.engine.grammar_builder import GrammarsFull
from twotower.engine.grammar_state import GrammarState, TokenRules, begin
from twotower.tokenizer import Tokenizer, train_tokenizer

EOS = 2
RULES = TokenRules(eos=(EOS,), mask_token_id=MASK, vocab_size=330)
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def state(grammar: Grammar, rules: TokenRules = RULES) -> GrammarState:
    return begin(grammar, byte_tokenizer(), rules)


def after(grammar: Grammar, text: str) -> GrammarState:
    found = state(grammar)
    found.follow(byte_tokenizer().encode(text))
    return found


def allowed(found: GrammarState) -> set[str]:
    """The tokens that may come next, as text; special ones by name."""
    tokens = found.mask().nonzero().flatten().tolist()
    return {byte_tokenizer().token_text(token) for token in tokens}


def test_the_mask_is_what_may_come_next() -> None:
    assert allowed(state(regex("[ab]c"))) == {"a", "b"}
    assert allowed(after(regex("[ab]c"), "a")) == {"c"}
    assert allowed(after(regex("[ab]c"), "ac")) == {"<eos>"}


def test_the_end_comes_only_where_the_grammar_lets_it() -> None:
    """Guards output that does not parse because EOS came early."""
    assert "<eos>" not in allowed(state(regex("a+")))
    assert allowed(after(regex("a+"), "a")) == {"a", "<eos>"}
    assert "<eos>" not in allowed(after(json_schema(NUMBER), '{"a": 1'))
    assert allowed(after(json_schema({"enum": ["x"]}), '"x"')) == {"<eos>"}


def test_no_grammar_allows_a_special_token() -> None:
    """Guards the mask token, which is no text, even where a grammar asks for it by name."""
    free = state(lark("start: /(.|\\n)*/"))
    assert not {"<mask>", "<pad>", "<bos>"} & allowed(free)
    assert "<mask>" not in allowed(after(lark('start: "a" (<mask> | "b")'), "a"))
    # a mask token that the tokenizer takes for text
    letter = byte_tokenizer().encode("b")[0]
    rules = TokenRules(eos=(EOS,), mask_token_id=letter, vocab_size=330)
    found = begin(regex("[ab]"), byte_tokenizer(), rules)
    assert not found.mask()[letter]


def test_the_rows_own_end_counts() -> None:
    """Guards a row that ends at another token than the tokenizer's <eos>."""
    letter = byte_tokenizer().encode("b")[0]
    rules = TokenRules(eos=(letter,), mask_token_id=MASK, vocab_size=330)
    found = begin(regex("a(b|c)?"), byte_tokenizer(), rules)
    assert not found.mask()[letter]
    found.follow(byte_tokenizer().encode("a"))
    assert found.mask()[letter], "the text may end here"
    assert not found.mask()[EOS]
    found.follow(byte_tokenizer().encode("ac"))
    assert found.mask().nonzero().flatten().tolist() == [letter]


def test_the_mask_has_the_models_length() -> None:
    mask = state(regex("a+")).mask()
    assert (mask.shape, mask.dtype) == ((330,), torch.bool)
    assert not mask[byte_tokenizer().vocab_size :].any()


def test_an_added_token_that_is_text_spells_its_letters() -> None:
    """Guards Qwen's <tool_call>, an added token that is not special: the library took it for one,
    and a call that was required failed as soon as it had to be written.
    """
    values = json.loads(byte_tokenizer().json_text)
    size = byte_tokenizer().vocab_size
    values["added_tokens"] += [
        values["added_tokens"][0] | {"id": size + i, "content": text, "special": False}
        for i, text in enumerate(("<call>", "</call>"))
    ]
    own = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)))
    found = begin(regex("<call>[ab]</call>c"), own, RULES)
    assert found.mask().nonzero().flatten().tolist() == [size] == found.forced()
    found.follow(own.encode("<call>a"))
    assert found.forced() == own.encode("</call>c") == [size + 1, *own.encode("c")]
    found.follow(own.encode("<call>a</call>"))
    assert found.mask().nonzero().flatten().tolist() == own.encode("c")
    spelt = [token for letter in "<call>" for token in own.encode(letter)]
    found.follow(spelt)  # by its letters, as text is also written
    assert {own.token_text(token) for token in found.mask().nonzero().flatten()} >= {"a", "b"}
    assert not found.mask()[list(own.special_ids)].any()


def test_a_draft_can_be_taken_back() -> None:
    """Guards verification: what was followed only in a draft must leave no trace."""
    encode = byte_tokenizer().encode
    properties = {name: {"type": "integer"} for name in "ab"}
    either = json_schema({"type": "object", "properties": properties})
    found = state(either)
    for text in ('{"a": 12}', '{"a"', '{"b": 3', '{"b": 3}', ""):
        found.follow(encode(text))
        assert allowed(found) == allowed(after(either, text)), text


def test_how_much_of_a_draft_is_possible() -> None:
    encode = byte_tokenizer().encode
    found = after(regex("[ab]{3}"), "a")
    for tokens, count in (
        ([], 0),
        (encode("b"), 1),
        (encode("ba"), 2),
        (encode("bx"), 1),
        (encode("x"), 0),
        ([*encode("ba"), EOS], 3),
        ([*encode("b"), MASK, *encode("a")], 1),
        ([*encode("b"), 329], 1),  # no token of the tokenizer
    ):
        assert found.num_allowed(tokens) == count
    assert allowed(found) == {"a", "b"}


def test_a_state_is_its_own() -> None:
    """Guards rows that share a compiled grammar."""
    one, other = state(regex("abc")), state(regex("abc"))
    one.follow(byte_tokenizer().encode("ab"))
    assert allowed(one) == {"c"}
    assert "a" in allowed(other)


def test_a_forbidden_token_is_an_error() -> None:
    found = state(regex("abc"))
    with pytest.raises(GrammarFailed, match=r"^grammar: ") as raised:
        found.follow(byte_tokenizer().encode("x"))
        found.mask()
    assert not raised.value.is_of_grammar  # whoever chose the token is to blame


def test_a_grammar_that_grows_too_large_is_to_blame_itself() -> None:
    wide = {f"p{i}": {"type": "string"} for i in range(3000)}
    found = state(json_schema({"type": "object", "properties": wide}))
    with pytest.raises(GrammarFailed, match=r"^grammar: .* max is 2000") as raised:
        found.follow(byte_tokenizer().encode('{"'))
        found.mask()
    assert raised.value.is_of_grammar


def test_what_must_come_next_is_forced() -> None:
    found = after(json_schema(NUMBER | {"additionalProperties": False}), '{"')
    assert byte_tokenizer().decode(found.forced()).startswith("a")
    assert state(regex("[ab]")).forced() == []


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (NUMBER, '{"a": 1}'),
        (NUMBER, ' {"a":1}'),
        (NUMBER, '{\n  "a": 1\n}'),
        (True, "[1, null]"),
        ({}, '"x"'),
        (json.dumps(NUMBER), '{"a": 1}'),
        ({"$defs": {"n": {"type": "null"}}, "$ref": "#/$defs/n"}, "null"),
    ],
)
def test_json_in_the_usual_forms(schema: dict[str, object] | bool | str, text: str) -> None:
    assert "<eos>" in allowed(after(json_schema(schema), text))


def test_white_space_is_bounded() -> None:
    """Guards a row in which a model writes spaces until its length is used up."""
    assert {" ", "\n"} < allowed(after(json_schema(NUMBER), "{"))
    assert allowed(after(json_schema(NUMBER), "{ ")).isdisjoint({" ", "\n", "\t"})
    assert {" ", "\t"} < allowed(after(json_schema(NUMBER), "{\n" + " " * 31))
    assert allowed(after(json_schema(NUMBER), "{\n" + " " * 32)).isdisjoint({" ", "\n", "\t"})
    assert " " not in allowed(after(json_schema(NUMBER), " "))
    assert " " not in allowed(after(json_schema(NUMBER), '{"a": 1}'))


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (json_schema({"type": "bogus"}), "json_schema: Invalid type: bogus"),
        (
            json_schema({"type": "array", "uniqueItems": True}),
            'Unimplemented keys: ["uniqueItems"]',
        ),
        (
            json_schema({"uniqueItems": True, "x-guidance": {"lenient": True}, "type": "array"}),
            'Unimplemented keys: ["uniqueItems"]',
        ),
        (json_schema({"$ref": "#/nope"}), "'/nope' does not exist"),
        (
            json_schema({"type": "object", "dependentSchemas": {"a": {}}, "title": "closed"}),
            'json_schema: Unimplemented keys: ["dependentSchemas"]',
        ),
        (json_schema(False), "Unsatisfiable"),
        (json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (regex("("), "regex: "),
        (lark("start: nothing"), 'lark: at 1(8): unknown name: "nothing"'),
        (lark("start: <mask>"), "grammar: no token can follow"),
    ],
)
def test_what_cannot_be_kept_is_one_line(grammar: Grammar, said: str) -> None:
    """Guards against constraints that are passed over, and errors in mid-text."""
    with pytest.raises(ValueError) as error:
        state(grammar)
    message = str(error.value)
    assert said in message
    assert "\n" not in message
    assert len(message) < 340


@pytest.mark.parametrize("schema", ["{", "[1]", [], 5, None, {"a": {1, 2}}])
def test_what_is_no_schema(schema: object) -> None:
    with pytest.raises(ValueError, match=r"json_schema: .*; give a"):
        json_schema(schema)  # type: ignore[arg-type]


def test_a_schema_deeper_than_python_is_an_error() -> None:
    deep: dict[str, object] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="json_schema: has more than"):
        json_schema(deep)
    with pytest.raises(ValueError, match="json_schema: not JSON"):
        json_schema('{"items":' * 100_000)


def chain(length: int) -> dict[str, object]:
    """A schema of so many references one behind the other."""
    definitions: dict[str, object] = {
        str(i): {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}}
        for i in range(length)
    }
    definitions[str(length)] = {"type": "null"}
    return {"$defs": definitions, "$ref": "#/$defs/0"}


def nested(depth: int, wrap: str) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {wrap: schema if wrap == "items" else [schema]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        chain(1001),
        nested(101, "items"),
        nested(51, "anyOf"),
        nested(51, "allOf"),
        {"enum": list(range(20_001))},
        {"const": "x" * 2_001},
        {"enum": ["x" * 2_001]},
        {"type": "object", "properties": {"x" * 2_001: {}}},
        {"type": "string", "pattern": "x" * 2_001},
        {"enum": ["x" * 1_000 + str(i) for i in range(300)]},
    ],
)
def test_a_schema_larger_than_any_that_is_meant_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"json_schema: has .*(more than|at most)") as error:
        json_schema(schema)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_long_descriptions_are_no_constants() -> None:
    assert "1" in allowed(state(json_schema({"type": "integer", "description": "x" * 9_000})))


def test_a_long_pattern_or_grammar_is_refused() -> None:
    for make in (regex, lark):
        with pytest.raises(ValueError, match="at most 32768"):
            make("a" * 40_000)


HOSTILE = {
    "1,000 references": json_schema(chain(999)),
    "twenty patterns at once": json_schema(
        {"allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}", "type": "string"} for i in range(20)]}
    ),
    "thirty at once": lark("start: T\nT: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(30))),
    "many names": json_schema(
        {"type": "object", "properties": {f"{i}pppppp": {"type": "integer"} for i in range(6_600)}}
    ),
    "many patterns of names": json_schema(
        {
            "type": "object",
            "patternProperties": {f"^a{{{i}}}b*{i}$": {"type": "integer"} for i in range(400)},
        }
    ),
    "a multiple": json_schema({"type": "integer", "multipleOf": 1_000_003}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_grammar_that_takes_too_much_ends_itself(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Guards the server: in its own process each of these ends it, or keeps it for minutes. Half of
    the time, for processors that are twice as fast."""
    monkeypatch.setattr(grammar_builder, "_BUILD_CPU_S", 1.0)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match="s or 128 MiB, or is too deep") as error:
        state(HOSTILE[name])
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10, "KiB, of ours"
    assert allowed(state(regex("[ab]c"))) == {"a", "b"}, "others go on"


@pytest.mark.parametrize(
    "grammar",
    [
        lark('start: e\ne: e e | e e e | /[a-z]/ | "(" e ")"'),
        lark('start: s\ns: s s | "a" | "b" |'),
        regex("a{100000}"),
    ],
)
def test_following_a_text_has_limits_as_well(grammar: Grammar) -> None:
    """Guards other rows, which wait for each mask."""
    found, text, start = state(grammar), byte_tokenizer().encode("a") * 3_000, time.monotonic()
    with pytest.raises(GrammarFailed, match="more time or memory than it may") as error:
        for length in range(len(text)):
            found.follow(text[:length])
            found.mask()
    assert error.value.is_of_grammar
    assert time.monotonic() - start < 5


def test_grammars_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards memory: seventy constants of 900 kB once kept 3.4 GB."""
    other = train_tokenizer(["c"], vocab_size=260)

    def first(number: int) -> GrammarState:
        return begin(regex(f"a{{{number}}}"), other, RULES)

    monkeypatch.setattr(grammar_builder, "_MAX_GRAMMARS", 3)
    held = [first(number) for number in range(1, 4)]
    with pytest.raises(GrammarsFull, match="try again later"):
        first(4)
    again = first(3)  # one that is in use
    del again, held[0]
    assert first(4), "the place of one that has ended"
    monkeypatch.setattr(grammar_builder, "_MAX_GRAMMARS", 100)
    monkeypatch.setattr(grammar_builder, "_MAX_BYTES", 1)
    with pytest.raises(GrammarsFull):
        first(5)
    monkeypatch.setattr(grammar_builder, "_MAX_BYTES", 1 << 30)
    monkeypatch.setattr(grammar_builder, "_MAX_KEPT", (1, 1 << 30))
    del held
    for number in range(10, 20):
        first(number)
    assert len(grammar_builder._builder(other)._alive) <= 2


def test_a_lost_root_is_started_again() -> None:
    """Guards a server that could build no grammar any more after one process was killed."""
    other = train_tokenizer(["d"], vocab_size=260)
    begin(regex("a"), other, RULES)
    process = grammar_builder._builder(other)._root._process
    assert isinstance(process, Forked)
    process._connection.close()
    with pytest.raises(GrammarsFull, match="no process"):
        begin(regex("b"), other, RULES)
    assert begin(regex("b"), other, RULES).mask().any()


def test_a_tokenizer_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="grammar: this tokenizer's tokens cannot be read as byte"):
        begin(regex("a"), tiny_tokenizer(), TokenRules((EOS,), MASK, 41))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    other = train_tokenizer(["b"], vocab_size=260)
    with pytest.raises(ValueError, match=r"pip install '\.\[serve\]'"):
        begin(regex("a"), other, RULES)
