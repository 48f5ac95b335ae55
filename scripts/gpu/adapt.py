"""Train a thin denoiser for a real backbone: on answers that it writes in large batches.

What `twotower adapt` does, with batches for a GPU. The same command resumes from --work, and trains
longer with more --minutes. The denoiser is also written in pieces of 16 MiB, which `cat` joins.
Without --model a small random model is used.

    PYTHONPATH=src python scripts/gpu/adapt.py --model FILE.gguf --prompts FILE.jsonl --work DIR
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from passes import config_of, random_model
from picture import Record
from stage import Stage

from twotower import TwoTower, accelerate
from twotower.adapt.answers import Question
from twotower.adapt.budget import Budget, Progress
from twotower.adapt.options import AnswerOptions, StepOptions, ThinOptions, WorkFolder
from twotower.adapt.run import collect_answers, train
from twotower.cli.scripts import script_parser
from twotower.lab.report import COLORS, new_figure
from twotower.loading import Loaded, Placement, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIECE = 2**24  # bytes
MAX_TOKENS = 1024  # of a prompt
SAID_EVERY_S = 10.0
FIELDS = "prompt", "question", "instruction"


def read_questions(files: list[Path], loaded: Loaded) -> list[Question]:
    """The prompts of JSON lines, one of FIELDS each, in the model's chat template."""
    from twotower.serve.chat import read_template

    template, tokenizer = read_template(loaded.folder), loaded.tokenizer
    assert tokenizer is not None
    found: list[Question] = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            text = next(
                record[key] for key in ("prompt", "question", "instruction") if key in record
            )
            ids = (
                tokenizer.encode_prompt(text)
                if template is None
                else template.encode([{"role": "user", "content": text}], None, tokenizer, 2**20)
            )
            if len(ids) <= MAX_TOKENS:
                found.append(Question(number=len(found), prompt=ids, task=file.stem))
    return found


def random_questions(count: int, vocab_size: int) -> list[Question]:
    """Prompts of no meaning, for a model of random weights."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab_size, (count, 8), generator=draw).tolist()
    return [Question(number=i, prompt=own, task="random") for i, own in enumerate(ids)]


def read_curve(work: WorkFolder) -> list[dict[str, Any]]:
    """Acceptance on held-out answers as far as it was measured."""
    if not work.curve.is_file():
        return []
    return [json.loads(line) for line in work.curve.read_text().splitlines()]


def paint(record: Record) -> "Figure":
    """Tokens a cycle over the blocks that were learnt from."""
    curve = record.get("curve", [])
    blocks, tokens = ([one[key] for one in curve] for key in ("blocks", "tokens_per_cycle"))
    figure = new_figure(8, 4.5)
    figure.suptitle("Adapt: what the denoiser's drafts give on held-out answers")
    axes = figure.subplots()
    axes.plot(blocks, tokens, marker="o", color=COLORS[0], label="with drafts")
    axes.axhline(1, color="black", linewidth=1, label="AR: no drafts")
    axes.set(xlabel="blocks learnt from", ylabel="tokens a cycle", xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def follow(stage: Stage, progress: Iterator[Progress], work: WorkFolder) -> None:
    """Say and write down how far a part is, now and then and at its end."""
    said, last = 0.0, None
    for last in progress:
        if time.monotonic() - said > SAID_EVERY_S:
            said = time.monotonic()
            print(f"{last.stage}: {last.seconds:.0f} of {last.of_seconds:.0f} s, {last.words}")
            stage.save(progress=vars(last), curve=read_curve(work))
    if last is not None:
        stage.add(part=last.stage, of_seconds=round(last.of_seconds, 1), words=last.words)


def cut(file: Path) -> list[str]:
    """Write a file once more in pieces that are small enough to be carried; their names."""
    content = file.read_bytes()
    names = []
    for number, start in enumerate(range(0, len(content), PIECE)):
        piece = file.with_name(f"{file.name}.{number:03d}")
        piece.write_bytes(content[start : start + PIECE])
        names.append(piece.name)
    return names


def backbone(stage: Stage) -> tuple[TwoTower, list[Question], str]:
    """The model whose drafts are wanted, what it is asked, and its name."""
    if stage.args.model is None:
        config = config_of("dense-1b", is_rehearsal=True)
        model = random_model(config, torch.float32, stage.device, "context")
        return model, random_questions(40, config.vocab_size), "random"
    placement = Placement(
        model=stage.args.model, device=str(stage.device), dtype=stage.args.dtype, backend="eager"
    )
    loaded = load(placement, "ar")
    return loaded.model, read_questions(stage.args.prompts, loaded), loaded.name


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--model", help="GGUF file or checkpoint folder of the backbone")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], help="files of JSON lines")
    parser.add_argument(
        "--work", type=Path, default=Path("gpu-adapt"), help="folder of answers and features"
    )
    parser.add_argument(
        "--minutes", type=float, default=3.2, help="time of all runs with this --work"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the passes"
    )
    parser.add_argument(
        "--backend", default="graphs", choices=("graphs", "eager"), help="what runs the passes"
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, help="answers decoded at the same time"
    )
    parser.add_argument(
        "--answers-per-step", type=int, default=64, help="answers of a training step"
    )
    parser.add_argument(
        "--blocks-per-answer", type=int, default=64, help="blocks of an answer and step"
    )
    stage = Stage("adapt", parser, paint)
    args, is_rehearsal = stage.args, stage.is_rehearsal
    model, questions, name = backbone(stage)
    work, budget = WorkFolder(args.work), Budget(minutes=args.minutes)
    work.path.mkdir(parents=True, exist_ok=True)
    thin = ThinOptions(layers=1, block_size=4, draft_vocab=32) if is_rehearsal else ThinOptions()
    answers = AnswerOptions(max_new_tokens=12 if is_rehearsal else 320, batch_size=args.batch_size)
    steps = StepOptions(
        answers_per_step=args.answers_per_step, blocks_per_answer=args.blocks_per_answer
    )
    writer = accelerate(model, args.backend)
    follow(stage, collect_answers(writer, questions, work, thin, answers, budget), work)
    out = args.work / "denoiser"
    follow(stage, train(model, work, thin, steps, budget, out, name), work)
    curve = read_curve(work)
    stage.close(curve=curve, pieces=cut(out / "model.safetensors"))
    print(json.dumps(curve[-1]))


if __name__ == "__main__":
    main()
