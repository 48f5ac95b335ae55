"""How often does each mode write the expected completion of a held-out prompt, in how many passes?

The prompts come from the corpus's test split, which training never draws from. Strict: the whole
completion must be equal, so another right answer counts as wrong. The limit is the AR row: the
denoiser learns from the same text and reads the same context. The last line is one JSON object.
"""

import argparse
import json
import random
import time

import torch

import twotower
from twotower.corpus import CATEGORIES, sample

MAX_NEW_TOKENS = 96  # longer than any completion of the corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=twotower.__path__[0] + "/assets")
    parser.add_argument("--modes", default="ar,diffusion")
    parser.add_argument("--items", type=int, default=50, help="prompts per category")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = twotower.load_model(args.model), twotower.load_tokenizer(args.model)
    table: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'category':12s} {'mode':18s} {'exact':>9s} {'tokens/NFE':>11s} {'tokens/s':>9s}")
    for category in CATEGORIES:
        rng = random.Random(args.seed)
        documents = [sample(category, "test", rng) for _ in range(args.items)]
        for mode in args.modes.split(","):
            row = score(model, tokenizer, documents, mode)
            table.setdefault(category, {})[mode] = row
            passes = f"{row['tokens_per_nfe']:.2f}" if row["nfe"] else "-"
            print(
                f"{category:12s} {mode:18s} {row['exact']:4.0f}/{args.items:<4d} "
                f"{passes:>11s} {row['tokens_per_s']:9.0f}",
                flush=True,
            )
    print(json.dumps({**vars(args), "torch": torch.__version__, "categories": table}))


def score(model, tokenizer, documents, mode) -> dict[str, float]:
    """Decode each prompt alone, with the checkpoint's options."""
    options = twotower.GenerateOptions(mode=mode, max_new_tokens=MAX_NEW_TOKENS)
    exact = tokens = nfe = 0
    start = time.perf_counter()
    for document in documents:
        (out,) = twotower.generate(model, [document.prompt], options, tokenizer)
        exact += out.text == document.completion
        tokens += len(out.tokens)
        nfe += out.nfe
    seconds = time.perf_counter() - start
    return {
        "exact": exact,
        "tokens": tokens,
        "nfe": nfe,
        "tokens_per_nfe": tokens / max(nfe, 1),
        "tokens_per_s": tokens / seconds,
    }


if __name__ == "__main__":
    main()
