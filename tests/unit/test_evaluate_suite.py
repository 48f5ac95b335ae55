"""The checkers: every reference passes, damage does not, and the sandbox holds."""

import json
import time
from dataclasses import replace
from random import Random

import pytest

pytest.importorskip("num2words")
pytest.importorskip("babel")
pytest.importorskip("jsonschema")

from twotower.corpus import CATEGORIES, Document, documents, sample
from twotower.corpus.documents import DRAWS
from twotower.evaluate import sandbox
from twotower.evaluate.sandbox import run_function
from twotower.evaluate.suite import CHECKS, check, held_out
from twotower.evaluate.suite.mathematics import evaluate

EXECUTED = {"code", "editing"}


def test_every_category_has_a_checker() -> None:
    assert tuple(CHECKS) == CATEGORIES


@pytest.mark.parametrize("category", CATEGORIES)
def test_references_are_right_and_damage_is_wrong(category: str) -> None:
    """Silent failure: a checker that refuses right answers, or that accepts anything."""
    for document in held_out(category, 12 if category in EXECUTED else 60, seed=3):
        verdict = check(document, document.completion)
        assert verdict.correct, (document, verdict)
        for text in ("", document.completion[: len(document.completion) // 2], "\n    return 0"):
            assert not check(document, text).correct, (document, text)
        other = sample(category, "test", Random(7))
        if other.answer != document.answer:
            assert not check(document, other.completion).correct


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_training_document_has_a_held_out_prompt(category: str) -> None:
    """Silent failure: held-out prompts that the training generator makes under another name."""
    prompts = {document.prompt for document in held_out(category, 200, seed=0)}
    assert len(prompts) == 200
    rng = Random(11)
    source = "lookup" if category == "long_context" else category
    drawn = {sample(source, "train", rng).prompt for _ in range(3000)}
    assert not prompts & drawn


def test_no_source_of_training_makes_a_prompt_of_another_category() -> None:
    prompts = {d.prompt for category in CATEGORIES for d in held_out(category, 200, seed=0)}
    stream = documents("train", 5, dict.fromkeys(set(DRAWS) - {"long_context"}, 1.0))
    assert not prompts & {next(stream).prompt for _ in range(5000)}


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
        (" 17 + 25 = 32 + 10 = 42. The answer is 42.", ""),
        (" 17 + 25 = 30 + 13 = 42. The answer is 42.", "step 1: 30 + 13 is not 42"),
        (" 17 + 26 = 42. The answer is 42.", "step 1: 17 + 26 instead of 17 + 25"),
        (" 17 - 25 = 42. The answer is 42.", "step 1: 17 - 25 instead of 17 + 25"),
        (" 17 + 25 = 42. The answer is 24.", "answer 24"),
        (" The answer is 42.", "0 steps instead of 1"),
        (" 17 + 25 = 42. 1 + 1 = 2. The answer is 42.", "2 steps instead of 1"),
        (" 17 + 25 = 30 + 12. The answer is 42.", "step 1: '17 + 25 = 30 + 12' has no result"),
        (" 17 + 25 = 42. Tom has 42.", "no final answer"),
        (" seventeen. The answer is 42.", "step 1: 'seventeen' is no equation"),
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
        ("\n    import os\n    os._exit(0)", "stopped with killed"),
        ("\n    raise SystemExit(0)", "stopped with SystemExit"),
        ('\n    print(\'{"results": ["4", "-6"], "error": ""}\')', "double[2] gave None"),
        ("\n    return str(n * 2)", "double[2] gave '4'"),
        ("\n    while True: pass", "stopped with killed"),
        ("\n    return [0] * (1 << 40)", "stopped with MemoryError"),
        (
            "\n    with open('x', 'w') as f:\n        f.write('y')\n    return n * 2",
            "stopped with OSError",
        ),
    ],
)
def test_functions_are_executed_under_limits(text: str, reason: str) -> None:
    """Silent failure: text that prints a result, leaves early or hangs passes for right."""
    sandbox_limit = sandbox.CPU_SECONDS
    begin = time.monotonic()
    verdict = check(CODE, text)
    assert (verdict.correct, verdict.reason) == (not reason, reason)
    assert time.monotonic() - begin < sandbox_limit + 8


def test_a_sleeping_function_ends_at_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: a run that waits forever uses no CPU seconds."""
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0.5)
    source = "import time\ndef f():\n    time.sleep(60)"
    assert run_function(source, "f", ["[]"]).error == "timeout"


def test_the_sandbox_has_no_environment_and_an_empty_folder() -> None:
    source = "import os\ndef f():\n    return [dict(os.environ), os.listdir()]"
    (result,) = run_function(source, "f", ["[]"]).results
    environment, files = json.loads(result.replace("'", '"'))
    assert files == [] and set(environment) <= {"LC_CTYPE"}  # set by the interpreter itself


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
