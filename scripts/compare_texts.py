"""Do two states of the code write the same texts? `compare_texts.py BASE HEAD` compares commits or
folders; without arguments it prints the digests of the code that is imported.

A line per case: what was decoded, a digest of the tokens, and one of tokens, counts and ends. The
shipped model decodes in every mode, greedy and sampled, eager and native; tiny random models with
every kind of layer decode with every option of the block samplers.
"""

import difflib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from twotower.checkpoint import load_checkpoint

MODES = ("ar", "speculative", "diffusion", "posterior", "predict-and-noise", "mock-ar")
TEXTS = (
    "Q: What is 25 + 99?\nA:",
    "# Return the items of numbers that are at most 73.\ndef at_most(numbers):",
    "Question: What money do people use in Vietnam?\nAnswer:",
    "Edit: Rename data to values.\ndef find(data):\n    return data\nEdited:\n",
    "Translate to German: the house is green.\n",
)
SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
TINY: tuple[dict[str, object], ...] = (
    *({"mode": mode} for mode in MODES),
    {"mode": "posterior", "schedule": "cosine", "steps_per_block": 7},
    {"mode": "predict-and-noise", "schedule": "exponential", "remask": "margin"},
    {"mode": "predict-and-noise", "remask": "random", "adaptive": True},
    {"mode": "diffusion", "confidence_threshold": 0.1, "block_size": 3},
    {"mode": "diffusion", "first_token": "context"},
    {"mode": "diffusion", "first_token": "context", "logprobs": 2},
    {"mode": "diffusion", "first_token": "context", "verify": 0.011},
    {"mode": "speculative", "draft_passes": 3, "logprobs": 1},
)
ENGINES: tuple[dict[str, int], ...] = ({}, {"batch_size": 2}, {"prefix_cache_bytes": 10**8})


def main(arguments: list[str]) -> int:
    """Print digests, or compare two; the exit status is 1 where they differ."""
    if not arguments:
        for line in digests():
            print(line, flush=True)
        return 0
    base, head = (run_at(state) for state in arguments)
    changes = list(difflib.unified_diff(base, head, *arguments, n=0, lineterm=""))
    print("\n".join(changes) or f"{len(head)} cases are equal")
    return bool(changes)


def run_at(state: str) -> list[str]:
    """The digests of a folder, or of a commit in a working tree of its own."""
    if Path(state).is_dir():
        return lines_of(Path(state))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), state], check=True)
        try:
            return lines_of(tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


def lines_of(folder: Path) -> list[str]:
    """The digests of the code in a folder."""
    path = os.pathsep.join(str(folder.resolve() / part) for part in ("src", "tests"))
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def digests() -> Iterator[str]:
    """Decode all cases with the code that is imported."""
    import torch

    import twotower
    from tiny_models import prompts_of, tiny_model

    torch.set_num_threads(1)
    assets = str(Path(twotower.__file__).parent / "assets")
    shipped, tokenizer = load_checkpoint(assets), twotower.load_tokenizer(assets)
    for name, model in (("eager", shipped), ("native", twotower.accelerate(shipped))):
        for mode in MODES:
            for changes in ({"mode": mode}, {"mode": mode, **SAMPLED}):
                for engine in ENGINES:
                    yield case(f"shipped {name}", model, TEXTS, changes, engine, tokenizer)
    for seed in (0, 1):
        tiny, prompts = tiny_model(seed), prompts_of([1, 7, 2, 19, 4], seed=seed)
        for variant in TINY:
            for changes in (variant, {**variant, **SAMPLED}):
                yield case(f"tiny {seed}", tiny, prompts, changes, {})


def case(name, model, prompts, changes, engine, tokenizer=None) -> str:  # type: ignore[no-untyped-def]
    """Decode the prompts of a case; its line."""
    import twotower
    from twotower.engine import EngineOptions

    fields = twotower.GenerateOptions.__dataclass_fields__
    verify = next(field for field in fields if field in ("verify_threshold", "review_threshold"))
    options = [
        twotower.GenerateOptions(
            **{verify if key == "verify" else key: value for key, value in changes.items()},
            max_new_tokens=(17 if tokenizer is None else 48) + i,
            seed=i,
        )
        for i in range(len(prompts))
    ]
    done = twotower.generate(model, prompts, options, tokenizer, EngineOptions(**engine))
    tokens = [one.tokens for one in done]
    counts = [(one.text, one.nfe, one.context_forwards, one.finish_reason) for one in done]
    logprobs = [
        [round(each.logprob, 3) + 0.0 for each in one.logprobs or ()] for one in done
    ]  # their last digits depend on how many rows share a pass
    shown = " ".join(f"{key}={value}" for key, value in (changes | engine).items())
    return f"{name} {shown}: {digest(tokens)} {digest([tokens, counts, logprobs])}"


def digest(value: object) -> str:
    """Twelve characters that differ where the value does."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
