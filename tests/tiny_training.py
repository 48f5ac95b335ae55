"""A shard and a run small enough for tests: seconds on one core."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from twotower.train.options import TrainOptions
from twotower.train.prepare import PrepareOptions, prepare


def write_documents(file: Path, count: int = 400) -> Path:
    """JSONL whose completions follow from their prompts, so that there is something to learn."""
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            record = {"prompt": f"Say {number % 10}: ", "completion": f"it is {number % 10}.\n"}
            stream.write(json.dumps(record) + "\n")
    return file


def make_shard(folder: Path, count: int = 400, align: int = 1) -> Path:
    """A token shard in `folder`, which must not exist."""
    source = write_documents(folder.with_name("documents.jsonl"), count)
    options = PrepareOptions(
        output=folder, input=(source,), vocab_size=270, tokens=100_000, align=align
    )
    for _ in prepare(options):
        pass
    return folder


def set_meta(folder: Path, **changes: object) -> None:
    """Change what a shard says about itself."""
    file = folder / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def saved_tensors(checkpoint: Path | None, prefix: str = "model.") -> dict[str, Tensor]:
    """The tensors of a checkpoint that one process wrote, by name without `prefix`."""
    assert checkpoint is not None
    (file,) = checkpoint.glob("*.safetensors")
    found = load_file(file).items()
    return {n.removeprefix(prefix): value for n, value in found if n.startswith(prefix)}


def tiny_options(data: Path, out: Path, **changes: object) -> TrainOptions:
    """Options of a backbone run on such a shard; metrics at every step."""
    values: dict[str, object] = {
        "recipe": "backbone",
        "data": str(data),
        "output": str(out),
        "preset": "tiny",
        "sequence_length": 32,
        "batch_size": 4,
        "steps": 8,
        "warmup_steps": 2,
        "dtype": "float32",
        "log_every": 1,
        "eval_every": 0,
        "checkpoint_every": 3,
        "tensorboard": False,
    }
    return TrainOptions(**(values | changes))  # type: ignore[arg-type]
