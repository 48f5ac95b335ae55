"""What do fewer bits cost on a real model's text: perplexity of written answers, same best tokens?

    python benchmarks/precision_quality.py MODEL FILE.jsonl

The file has a question and an answer a line (GSM8K's form). The question is a user's message in the
model's chat template, and the answer is read behind it by native passes in each precision. Same
weights everywhere: what differs is the rounding. The last line is one JSON object.
"""

import json
import math
from pathlib import Path

import torch

import twotower
from twotower.backends import QUANTIZATIONS
from twotower.cli.machine import recorded
from twotower.cli.questions import question_encoder
from twotower.cli.scripts import script_parser
from twotower.loading import Placement, load


@torch.no_grad()
def read(model: twotower.TwoTower, prompt: list[int], answer: list[int]) -> tuple[float, list[int]]:
    """Natural-log loss of an answer, summed, and the best token at each of its places."""
    ids = torch.tensor([[*prompt, *answer]])
    hidden = model.extend(model.empty_cache(1), ids)[:, len(prompt) - 1 : -1]
    logits = model.context_head(hidden)[0]
    loss = -logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).sum()
    return float(loss), logits.argmax(-1).tolist()


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("model", help="checkpoint folder, GGUF file or hub id")
    parser.add_argument("file", type=Path, help="JSONL file, a question and an answer a line")
    parser.add_argument("--items", type=int, default=100, help="lines to read")
    args = parser.parse_args()
    lines = args.file.read_text("utf-8").splitlines()[: args.items]
    pairs = [(values["question"], values["answer"]) for values in map(json.loads, lines)]
    found: dict[str, dict[str, float]] = {}
    best: dict[str, list[int]] = {}
    for quantization in QUANTIZATIONS:
        loaded = load(
            Placement(model=args.model, backend="native", quantization=quantization), "ar"
        )
        assert loaded.tokenizer is not None
        encode = question_encoder(loaded, "this benchmark", is_plain=False)
        prompts = [encode(question, "the file") for question, _ in pairs]
        answers = [loaded.tokenizer.encode(answer) for _, answer in pairs]
        losses, best[quantization] = 0.0, []
        for prompt, answer in zip(prompts, answers, strict=True):
            loss, tokens = read(loaded.model, prompt, answer)
            losses += loss
            best[quantization] += tokens
        num_tokens = len(best[quantization])
        same = sum(map(int.__eq__, best[quantization], best["none"]))
        found[quantization] = {
            "perplexity": math.exp(losses / num_tokens),
            "same_best": same / num_tokens,
        }
        print(quantization, found[quantization], flush=True)
    record = {
        "recorded": recorded(),
        "model": Path(args.model).stem,
        "texts": len(pairs),
        "tokens": num_tokens,
        "precisions": found,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
