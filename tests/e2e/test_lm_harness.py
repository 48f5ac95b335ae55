"""lm-eval on our models: requests answered, arguments checked, tasks written and judged."""

import json
from pathlib import Path

import pytest

pytest.importorskip("jsonschema")
pytest.importorskip("num2words")

import twotower
from tiny_checkpoint import make_checkpoint
from twotower.cli.lm_eval import load_decoder
from twotower.cli.main import main
from twotower.evaluate.lm_harness import Decoder, HarnessOptions
from twotower.evaluate.lm_tasks import process_humaneval, process_results, write_tasks
from twotower.evaluate.suite import held_out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("harness") / "model"))


def decoder(checkpoint: str, **values: object) -> Decoder:
    options = HarnessOptions.from_arguments({"pretrained": checkpoint, **values})
    return load_decoder(options)


def test_generation_honours_each_requests_arguments(checkpoint: str) -> None:
    """Silent failure: a stop string or a token limit of one request is used for another."""
    model = twotower.load_model(checkpoint)
    tokenizer = twotower.load_tokenizer(checkpoint)
    plain = twotower.GenerateOptions(mode="ar", max_new_tokens=12)
    (whole,) = twotower.generate(model, ["abc"], plain, tokenizer)
    stop = whole.text[3:5]
    requests = [("abc", {"max_gen_toks": 12}), ("abc", {"max_gen_toks": 12, "until": [stop]}),
                ("abc", {"max_gen_toks": 2, "until": None, "do_sample": False})]  # fmt: skip
    for batch_size in (1, 3):
        texts = decoder(checkpoint, mode="ar", batch_size=batch_size).write(requests)
        assert texts[0] == whole.text
        assert texts[1] == whole.text[: whole.text.index(stop)]
        assert whole.text.startswith(texts[2]) and len(texts[2]) < len(whole.text)
    with pytest.raises(ValueError, match="generation_kwargs: num_beams is not supported"):
        decoder(checkpoint).write([("abc", {"num_beams": 4})])


def test_white_space_belongs_to_the_continuation(checkpoint: str) -> None:
    """Silent failure: likelihoods depend on which side of the border a space was written."""
    one, other = decoder(checkpoint).score([("abc ", "de"), ("abc", " de")])
    assert one == other and one.log_likelihood < 0
    (rolling,) = decoder(checkpoint).score([("", "abc de")])
    assert rolling.num_tokens == len(twotower.load_tokenizer(checkpoint).encode("abc de"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modus": "ar"}, "modus is unknown; the nearest is mode"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dtype": "int4"}, "dtype='int4'"),
    ],
)
def test_bad_model_arguments_are_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        HarnessOptions.from_arguments(values)
    assert "\n" not in str(caught.value)


def test_tasks_hold_the_suite_and_are_judged_by_its_checkers(tmp_path: Path) -> None:
    """Silent failure: the tasks' items or judges differ from the suite's."""
    paths = write_tasks(tmp_path, 3, seed=0)
    assert {"twotower_math.yaml", "twotower_refusal.yaml", "twotower_mini.yaml"} <= {
        path.name for path in paths
    }
    for category in ("math", "tools", "code"):
        lines = (tmp_path / f"twotower_{category}.jsonl").read_text().splitlines()
        documents = held_out(category, 3, seed=0)
        for line, document in zip(lines, documents, strict=True):
            record = json.loads(line)
            assert record["prompt"] == document.prompt
            assert process_results(record, [document.completion]) == {"acc": 1.0}
            assert process_results(record, [document.completion[:-4]]) == {"acc": 0.0}


def test_humaneval_runs_the_problems_own_tests() -> None:
    """Silent failure: a problem counts as solved because its tests never ran."""
    problem = {
        "prompt": "def twice(n):\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4 and candidate(0) == 0\n",
        "entry_point": "twice",
    }
    assert process_humaneval(problem, ["    return 2 * n\n"]) == {"acc": 1.0}
    assert process_humaneval(problem, ["    return 4\n"]) == {"acc": 0.0}
    assert process_humaneval(problem, ["    import os; os._exit(0)\n"]) == {"acc": 0.0}


def test_lm_eval_itself_runs_a_task(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "twotower[lm-eval]"')
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert main(["lm-eval", "--write-tasks", str(tmp_path / "tasks"), "--items", "2"]) == 0
    arguments = ["run", "--model", "twotower", "--model_args", f"pretrained={checkpoint},mode=ar"]
    arguments += ["--tasks", "twotower_tools", "--include_path", str(tmp_path / "tasks")]
    assert main(["lm-eval", *arguments, "--output_path", str(tmp_path / "out")]) == 0
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["twotower_tools"]["acc,none"] == 0.0


def test_write_tasks_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", "--write-tasks"]) == 2
    assert main(["lm-eval", "--write-tasks", "x", "--items", "many"]) == 2
    assert "is not --items N" in capsys.readouterr().err
