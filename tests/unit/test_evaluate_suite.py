"""The checkers: every reference passes, damage does not, and the sandbox holds."""

import json
import warnings
from dataclasses import replace
from random import Random

import pytest

pytest.importorskip("num2words")
pytest.importorskip("babel")
pytest.importorskip("jsonschema")


from twotower.lab.corpus import CATEGORIES, Document, documents, sample
from twotower.lab.corpus.documents import DRAWS
from twotower.lab.evaluate.sandbox import Sandbox, find_sandbox
from twotower.lab.evaluate.suite import (
    CHECKED,
    EXECUTED,
    check,
    dump_tree,
    evaluate,
    held_out,
    is_same,
)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return find_sandbox(allow_unsandboxed=True)


def test_every_category_has_one_checker() -> None:
    assert sorted([*CHECKED, *EXECUTED]) == sorted(CATEGORIES)


@pytest.mark.parametrize("category", CATEGORIES)
def test_references_are_right_and_damage_is_wrong(category: str, sandbox: Sandbox) -> None:
    """Silent failure: a checker that refuses right answers, or that accepts anything."""
    for document in held_out(category, 12 if category in EXECUTED else 60, seed=3):
        verdict = check(document, document.completion, sandbox)
        assert verdict.correct, (document, verdict)
        for text in ("", document.completion[: len(document.completion) // 2], "\n    return 0"):
            assert not check(document, text, sandbox).correct, (document, text)
        other = sample(category, "test", Random(7))
        if other.answer != document.answer:
            assert not check(document, other.completion, sandbox).correct


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_training_document_has_a_held_out_prompt(category: str) -> None:
    """Silent failure: held-out prompts that the training generator makes under another name."""
    prompts = {document.prompt for document in held_out(category, 200, seed=0)}
    assert len(prompts) == 200
    rng = Random(11)
    source = "lookup" if category == "long_context" else category
    drawn = {sample(source, "train", rng).prompt for _ in range(500)}
    assert not prompts & drawn


def test_no_source_of_training_makes_a_prompt_of_another_category() -> None:
    prompts = {d.prompt for category in CATEGORIES for d in held_out(category, 200, seed=0)}
    stream = documents("train", 5, dict.fromkeys(set(DRAWS) - {"long_context"}, 1.0))
    assert not prompts & {next(stream).prompt for _ in range(1000)}


SUM = Document(
    category="math",
    prompt="Q: What is 17 + 25?\nA:",
    completion=" 17 + 25 = 30 + 12 = 42. The answer is 42.",
    key="17+25",
    answer={"final": 42, "steps": [{"expression": "17 + 25", "result": 42}]},
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" 17 + 25 = 42. The answer is 42.", ""),
        (" 25 + 17 = 42. The answer is 42.", ""),
        (" 17+25 = 30 +12=42. The answer is 42.", ""),
        (" 17 + 25 = - 42. The answer is -42.", "step 1: '17 + 25 = - 42' is not an equation"),
        (" 17 + 25 = 32 + 10 = 42. The answer is 42.", ""),
        (" 17 + 25 = 30 + 13 = 42. The answer is 42.", "step 1: 30 + 13 is not 42"),
        (" 17 + 26 = 42. The answer is 42.", "step 1: 17 + 26 instead of 17 + 25"),
        (" 17 - 25 = 42. The answer is 42.", "step 1: 17 - 25 instead of 17 + 25"),
        (" 17 + 25 = 42. The answer is 24.", "answer 24"),
        (" The answer is 42.", "0 steps instead of 1"),
        (" 17 + 25 = 42. 1 + 1 = 2. The answer is 42.", "2 steps instead of 1"),
        (" 17 + 25 = 30 + 12. The answer is 42.", "step 1: '17 + 25 = 30 + 12' has no result"),
        (" 17 + 25 = 42. Tom has 42.", "no final answer"),
        (" seventeen. The answer is 42.", "step 1: 'seventeen' is not an equation"),
    ],
)
def test_every_step_of_a_sum_is_judged(text: str, reason: str) -> None:
    """Silent failure: a right answer reached by wrong steps, or by luck."""
    verdict = check(SUM, text)
    assert (verdict.correct, verdict.reason) == (not reason, reason)


def test_terms_are_computed() -> None:
    assert evaluate("2 + 3 * 4 - 5") == 9
    assert evaluate("100 - 6") == 94
    assert evaluate("7") == 7


CODE = Document(
    category="code",
    prompt="# Return the double of n.\ndef double(n):",
    completion="\n    return n * 2",
    key="double",
    answer={
        "name": "double",
        "source": "def double(n):\n    return n * 2",
        "tests": [{"args": "[2]", "expected": "4"}, {"args": "[-3]", "expected": "-6"}],
    },
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n    return n + n", ""),
        ("\n    return 4", "double[-3] gave 4"),
        ("\n    return n *", "does not parse"),
        ("\n    return m * 2", "stopped with NameError"),
        ("\n    raise SystemExit(0)", "stopped with SystemExit"),
        ("\n    return str(n * 2)", "double[2] gave '4'"),
        ("\n    return [0] * (1 << 40)", "stopped with MemoryError"),
    ],
)
def test_functions_are_executed(text: str, reason: str, sandbox: Sandbox) -> None:
    """Silent failure: a function that only looks right, or fails on one test, counts as right."""
    verdict = check(CODE, text, sandbox)
    assert (verdict.correct, verdict.reason) == (not reason, reason)


@pytest.mark.parametrize(
    ("result", "expected", "same"),
    [
        ("{'b': 1, 'a': 2}", "{'a': 2, 'b': 1}", True),
        ("[{2: {'y': 1, 'x': 0}, 1: 0}]", "[{1: 0, 2: {'x': 0, 'y': 1}}]", True),
        ("{'a': 1}", "{'a': True}", False),
        ("[1, 2]", "[2, 1]", False),
        ("1", "1.0", False),
        ("1", "True", False),
        ("'1'", "1", False),
        ("<object>", "1", False),
    ],
)
def test_results_are_compared_as_values(result: str, expected: str, same: bool) -> None:
    """Silent failure: a right dictionary that was filled in another order counts as wrong."""
    assert is_same(result, expected) is same


def test_a_strange_text_is_parsed_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dump_tree("x = '\\d'") is not None
    assert dump_tree("x = '\0'") is None and dump_tree("(" * 5000) is None


def test_an_edit_must_be_the_function_that_was_asked_for() -> None:
    """Silent failure: an edit that behaves alike but is another text, a renaming left out."""
    document = replace(CODE, category="editing", completion="def double(n):\n    return n * 2")
    assert check(document, "def double(n):\n    return n*2  # same tree").correct
    assert check(document, "def double(n):\n    return n + n").reason == (
        "another function than asked for"
    )


def test_tool_calls_are_parsed_and_validated() -> None:
    document = sample("tools", "test", Random(0))
    call = json.loads(document.completion)
    assert check(document, json.dumps(call, indent=2)).correct
    swapped = {"arguments": call["arguments"], "name": call["name"]}
    assert check(document, json.dumps(swapped)).correct
    for name in call["arguments"]:
        less = {key: value for key, value in call["arguments"].items() if key != name}
        assert check(document, json.dumps({**call, "arguments": less})).reason.startswith("schema")
        other = {**call["arguments"], name: [1]}
        assert check(document, json.dumps({**call, "arguments": other})).reason.startswith("schema")
    extra = {**call["arguments"], "more": 1}
    assert not check(document, json.dumps({**call, "arguments": extra})).correct
    assert check(document, json.dumps({**call, "name": "nothing"})).reason == "called nothing"
    assert check(document, json.dumps([call])).reason == "not an object of name and arguments"


def test_the_items_of_a_seed_are_the_same_and_differ_by_seed() -> None:
    first, again, other = (held_out("tools", 20, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len({document.prompt for document in first}) == 20


def test_a_code_must_be_that_of_the_asked_thing() -> None:
    """Silent failure: the right number said of another thing counts as found."""
    document = sample("long_context", "test", Random(3))
    expected = document.answer["expected"]
    subject = str(document.answer["sentence"]).removeprefix("The code of the ").split(" is ")[0]
    assert check(document, f" {expected}").correct
    assert check(document, f" The code  of the {subject} is {expected}.").correct
    verdict = check(document, f" The code of the odd thing is {expected}.")
    assert verdict.reason == "the code of another thing"
    assert check(document, f" The code of the {subject} is {expected} or 1.").reason.startswith(
        "gave"
    )


def test_more_items_than_there_are_is_one_line() -> None:
    """Silent failure: a request that no category can fill runs forever."""
    with pytest.raises(ValueError, match=r"items: 5000 is more than .* of knowledge") as caught:
        held_out("knowledge", 5000, seed=0)
    assert "\n" not in str(caught.value)
    most = int(str(caught.value).split("about ")[1].split()[0])
    assert most >= 200 and len(held_out("knowledge", most - 1, seed=5)) == most - 1
