"""The corpus: held-out means held out, every reference answer is right, a seed is a seed."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import date
from itertools import islice
from random import Random

import pytest

pytest.importorskip("num2words")
pytest.importorskip("babel")

from twotower.lab.corpus import CATEGORIES, DEFAULT_WEIGHTS, Document, documents, sample, split_of
from twotower.lab.corpus.arithmetic import apply_step, draw, write_step
from twotower.lab.corpus.code import FAMILIES, NAMES_OF, WrittenFunction, arguments_for, make_tests
from twotower.lab.corpus.documents import DRAWS
from twotower.lab.corpus.knowledge import facts
from twotower.lab.corpus.knowledge import write_sentence as write_fact
from twotower.lab.corpus.multilingual import (
    FOREIGN,
    NOUNS,
    VERBS,
    number_word,
    write_date,
    write_sentence,
)
from twotower.lab.corpus.refusal import TOPICS

NUM_SAMPLES = 1000
# The first model's names of these categories: another hash would move what it was trained on.
FIRST_NAMES = {
    "math": "arithmetic",
    "editing": "edits",
    "multilingual": "words",
    "knowledge": "facts",
}
MIN_TEST_ITEMS = 200


@pytest.fixture(scope="module")
def train() -> dict[str, list[Document]]:
    return _draw_all("train", 1)


@pytest.fixture(scope="module")
def test() -> dict[str, list[Document]]:
    return _draw_all("test", 2)


def _draw_all(split: str, seed: int) -> dict[str, list[Document]]:
    rng = Random(seed)
    return {name: [sample(name, split, rng) for _ in range(NUM_SAMPLES)] for name in CATEGORIES}


@pytest.mark.parametrize("category", CATEGORIES)
def test_key_decides_the_split_and_prompt_decides_the_key(category, train, test):
    """Guards: a held-out prompt that training has seen, which turns accuracy into memory.

    Both rules together prove disjointness: a prompt has one key, a key has one split.
    """
    key_of: dict[str, str] = {}
    for split, drawn in (("train", train[category]), ("test", test[category])):
        for document in drawn:
            name = FIRST_NAMES.get(category, category)
            digest = hashlib.blake2b(f"{name}:{document.key}".encode(), digest_size=4).digest()
            held_out = int.from_bytes(digest, "big") % 16 == 0
            assert held_out == (split == "test")
            assert key_of.setdefault(document.prompt, document.key) == document.key
    seen = {document.prompt for document in train[category]}
    assert not seen & {document.prompt for document in test[category]}


@pytest.mark.parametrize("category", CATEGORIES)
def test_enough_held_out_items(category, test):
    """Guards: a test set that repeats a few items, whose interval is then a fiction."""
    assert len({document.key for document in test[category]}) >= MIN_TEST_ITEMS


@pytest.mark.parametrize("category", CATEGORIES)
def test_documents_are_short_whole_and_plain_json(category, train, test):
    """Guards: a placeholder left in the text, a boundary inside a word, an answer JSON changes."""
    for document in train[category] + test[category]:
        text = document.prompt + document.completion
        assert len(text) < (20_000 if category == "long_context" else 400)
        assert document.prompt and document.completion.strip()
        assert not re.search(r"\{[a-z]\w{0,10}\}", document.prompt + document.completion)
        # No token may straddle the boundary: white space is on one side of it only.
        assert document.prompt[-1].isspace() != document.completion[0].isspace()
        assert document.completion == document.completion.rstrip()
        assert json.loads(json.dumps(document.answer)) == document.answer


def test_arithmetic_steps_are_right(train, test):
    """Guards: a wrong reference, which trains and grades the wrong sum."""
    for document in train["math"] + test["math"]:
        *sentences, last = document.completion.strip().removesuffix(".").split(". ")
        steps = document.answer["steps"]
        assert len(sentences) == len(steps)
        for sentence, step in zip(sentences, steps, strict=True):
            first, *others = sentence.split(" = ")
            assert first == step["expression"]
            assert {eval(form) for form in (first, *others)} == {step["result"]}
        assert last == f"The answer is {document.answer['final']}"
        assert steps[-1]["result"] == document.answer["final"]
        assert 0 <= document.answer["final"] < 1000


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ((17, "+", 25), "17 + 25 = 30 + 12 = 42."),
        ((42, "-", 8), "42 - 8 = 40 - 6 = 34."),
        ((40, "+", 30), "40 + 30 = 70."),
        ((7, "-", 3), "7 - 3 = 4."),
        ((30, "-", 9), "30 - 9 = 21."),
        ((152, "-", 48), "152 - 48 = 110 - 6 = 104."),
        ((7, "*", 8), "7 * 8 = 56."),
        ((12, "*", 9), "12 * 9 = 90 + 18 = 108."),
    ],
)
def test_steps_split_tens_and_ones(step, text):
    assert write_step(step) == text


def test_arithmetic_uses_the_numbers_of_its_question():
    """Guards: a question about other numbers than the answer's, which nothing else would notice."""
    rng = Random(3)
    for _ in range(2000):
        draft = draw(rng)
        asked = set(re.findall(r"\d+", draft.prompt))
        made = {"100"}
        for step in draft.answer()["steps"]:
            left, operator, right = step["expression"].split()
            assert {left, right} <= asked | made
            made.add(str(apply_step((int(left), operator, int(right)))))


def test_commuted_sums_share_a_key():
    """Guards: 25 + 17 in training when 17 + 25 is held out."""
    rng = Random(4)
    for _ in range(2000):
        for part in draw(rng).key.split(";"):
            left, sign, right = re.fullmatch(r"(\d+)([-+*])(\d+)", part).groups()
            assert sign == "-" or int(left) <= int(right)


def test_code_completions_pass_their_tests(train, test):
    """Guards: tests that the reference itself would fail, or a body that does not parse."""
    for category in ("code", "editing"):
        for document in (train[category] + test[category])[::5]:
            is_code = category == "code"
            head = document.prompt if is_code else ""
            scope: dict[str, object] = {}
            exec(head + document.completion, scope)
            function = scope[document.answer["name"]]
            assert ast.dump(ast.parse(head + document.completion)) == ast.dump(
                ast.parse(document.answer["source"])
            )
            for case in document.answer["tests"]:
                result = function(*ast.literal_eval(case["args"]))
                assert repr(result) == case["expected"]


def test_every_family_is_seen_in_training_and_no_constant_passes_its_tests(train):
    """Guards: a family lost from training, and tests that any function would pass."""
    assert len(FAMILIES) >= 40
    keys = {document.key.split("(")[0] for document in train["code"]}
    assert {family.names.split()[0] for family in FAMILIES} <= keys
    for document in train["code"]:
        assert len({case["expected"] for case in document.answer["tests"]}) > 1
    assert arguments_for("number", ("7",)) == [[0], [7], [8], [12]]


@pytest.mark.parametrize("values", [("3", "4"), ("5", "8"), ("31", "88")])
def test_the_tests_tell_families_apart(values):
    """Guards: tests that accept the function of another comment as a right answer."""
    constants = {"num": values[:1], "num num": values, "-": (), "small": ("4",)}
    results: dict[tuple[str, ...], str] = {}
    for family in FAMILIES:
        if family.constants in constants:
            function = WrittenFunction(
                family=family,
                name="f",
                variables=NAMES_OF[family.argument][0],
                constants=constants[family.constants],
            )
            cases = make_tests(function, function.source, "f")
            key = (family.constants, *(case["args"] + case["expected"] for case in cases))
            assert results.setdefault(key, family.names) == family.names


def test_edits_change_the_function_and_never_show_a_held_out_one(train, test):
    """Guards: an edit that asks for nothing, or that shows the body a code test asks for."""
    bodies = {document.completion.removeprefix("\n") for document in test["code"]}
    kinds = set()
    for document in train["editing"] + test["editing"]:
        original = document.prompt.split("\n", 1)[1].removesuffix("\nEdited:\n")
        assert ast.dump(ast.parse(original)) != ast.dump(ast.parse(document.completion))
        assert original.split("\n", 1)[1] not in bodies
        assert document.completion.split("\n", 1)[1] not in bodies
        kinds.add(document.answer["kind"])
    assert len(kinds) >= 10


def test_tool_calls_fit_their_schema_and_copy_the_request(train, test):
    """Guards: an argument that the request does not contain, so that only guessing gets it."""
    names = set()
    for document in train["tools"] + test["tools"]:
        call, schema = json.loads(document.completion), document.answer["schema"]
        names.add(call["name"])
        assert call == {key: document.answer[key] for key in ("name", "arguments")}
        assert list(call["arguments"]) == schema["required"] == list(schema["properties"])
        request = document.prompt.split("User: ")[1]
        for name, value in call["arguments"].items():
            rule = schema["properties"][name]
            assert isinstance(value, {"string": str, "integer": int}[rule["type"]])
            assert value in rule.get("enum", [value])
            assert str(value) in request
        assert f"\n{call['name']}(" in document.prompt
    assert len(names) >= 15


@pytest.mark.parametrize("name", ["answered", "math_with_tools", "refusal_with_tools"])
def test_with_tools_an_answer_may_be_text(name):
    """Guards: a call where no shown tool fits or one has answered, which teaches agents to loop;
    and a result that the answer does not have."""
    rng, kinds = Random(f"text {name}"), set()
    for _ in range(NUM_SAMPLES):
        document = sample(name, "train", rng)
        signatures, asked = document.prompt.removeprefix("Tools:\n").split("\nUser: ")
        _, *turns = asked.removesuffix("\nCall:").split("\nCall: ")
        shown = [signature.split("(")[0] for signature in signatures.split("\n")]
        assert len(set(shown)) == len(shown)
        assert not document.completion.startswith(" {")
        assert name != "math_with_tools" or not {"add_numbers", "multiply"} & {*shown}
        if turns:
            call, result = turns[0].split("\nResult: ")
            assert json.loads(call)["name"] in shown
            assert document.completion == f" The result is {result}."
        elif document.key.startswith('{"name"'):
            assert json.loads(document.key)["name"] not in shown
        kinds.add((bool(turns), document.key.startswith('{"name"'), len(shown)))
    assert {(turn, n) for turn, _, n in kinds} >= {(name == "answered", n) for n in (1, 2, 3)}
    assert len(kinds) == (9 if name == "answered" else 3)


def test_words_and_facts_hold_their_answer(train, test):
    """Guards: an expected word that the completion does not contain, or fewer languages."""
    for category in ("multilingual", "knowledge"):
        for document in train[category] + test[category]:
            assert document.answer["expected"] in document.completion
    assert len({document.answer["language"] for document in test["multilingual"]}) >= 6
    assert number_word(47, "fr") == "quarante-sept"
    currency = next(fact for fact in facts() if (fact.kind, fact.subject) == ("currency", "Japan"))
    assert write_fact(currency) == "The currency of Japan is the Japanese yen."


def test_long_context_puts_the_fact_where_it_says(train, test):
    """Guards: a needed fact that is missing, doubled, or nearer than the distance claims."""
    distances = set()
    for document in train["long_context"][::5] + test["long_context"][::5]:
        notes, _, question = document.prompt.partition("\nQ: ")
        assert notes.count(document.answer["sentence"]) == 1
        after = notes.split(document.answer["sentence"])[1]
        assert after.count(".") == document.answer["distance"]
        subject = question.removeprefix("What is the code of the ").split("?")[0]
        assert notes.count(f"The code of the {subject} is") == 1
        assert document.completion == f" {document.answer['sentence']}"
        distances.add(document.answer["distance"])
    assert min(distances) < 40 and max(distances) > 300


def test_refusals_follow_the_class_of_the_request(train, test):
    """Guards: a refused class that is answered, or one frame for all refusals alone."""
    refused = [d for d in train["refusal"] + test["refusal"] if d.answer["refuse"]]
    served = [d for d in train["refusal"] + test["refusal"] if not d.answer["refuse"]]
    assert 0.4 < len(refused) / (len(refused) + len(served)) < 0.6
    assert all(d.completion.startswith(" I cannot help you ") for d in refused)
    assert all(d.completion.startswith(" Yes, I can help you ") for d in served)
    assert len({d.answer["topic"] for d in refused}) == 7
    actions = [action for topic in TOPICS for action in topic.actions]
    assert len(actions) == len(set(actions))


@pytest.mark.parametrize("language", FOREIGN)
def test_sentences_have_a_word_for_every_word(language):
    """Guards: a table row with a word too few, which shifts every language behind it."""
    assert {len(row) for row in (*VERBS.values(), *NOUNS.values())} == {len(FOREIGN)}
    assert write_sentence("Ann", "sees", 14, "birds", "de") == "Ann sieht vierzehn Vögel."
    assert write_sentence("Ann", "buys", 3, "eggs", "sv") == "Ann köper tre ägg."
    assert write_date(date(2025, 3, 7), "es") == "7 de marzo de 2025"
    words = [write_sentence("Ann", verb, 3, "keys", language) for verb in VERBS]
    assert len(set(words)) == len(VERBS)


def test_every_held_out_fact_is_taught_in_another_form():
    """Guards: a fact held out in all its forms, which no model could know."""
    rng = Random(5)
    taught = {sample("knowledge", "train", rng).answer["sentence"] for _ in range(20_000)}
    assert {sample("knowledge", "test", rng).answer["sentence"] for _ in range(1000)} <= taught


def test_a_seed_gives_the_same_stream_in_another_process():
    """Guards: salted hashing or set order, which would make a run impossible to repeat."""
    program = (
        "from itertools import islice; from twotower.lab.corpus import documents\n"
        "print([d.prompt + d.completion for d in islice(documents('train', 7), 200)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    here = [
        document.prompt + document.completion for document in islice(documents("train", 7), 200)
    ]
    assert ast.literal_eval(result.stdout.decode()) == here
    assert here != [item.prompt + item.completion for item in islice(documents("train", 8), 200)]


def test_the_mixture_follows_the_weights():
    assert sum(DEFAULT_WEIGHTS.values()) == pytest.approx(1.0)
    assert set(DEFAULT_WEIGHTS) == set(DRAWS) - {"long_context"}
    drawn = [document.category for document in islice(documents("train", 0), 4000)]
    for category, weight in DEFAULT_WEIGHTS.items():
        assert drawn.count(category) / len(drawn) == pytest.approx(weight, abs=0.03)
    only = islice(documents("test", 0, {"tools": 1.0}), 50)
    assert all(document.category == "tools" for document in only)
    assert split_of("tools", "x") in ("train", "test")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample("poetry", "train", Random(0)), "category='poetry' is unknown"),
        (lambda: sample("code", "dev", Random(0)), "split='dev' is unknown"),
        (lambda: next(documents("dev", 0)), "split='dev' is unknown"),
        (lambda: documents("train", 0, {"poetry": 1.0}), "category 'poetry' is unknown"),
        (lambda: documents("train", 0, {"code": -1.0}), "must be 0 or more"),
        (lambda: documents("train", 0, {"code": 0.0}), "sum to 0"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["babel", "num2words"])
def test_a_missing_library_says_what_to_install(library, monkeypatch):
    from twotower.lab.corpus import knowledge, multilingual

    for table in (knowledge.facts, multilingual.number_word):
        table.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'pip install "\.\[data\]"'):
        knowledge.facts() if library == "babel" else multilingual.number_word(3, "fr")
