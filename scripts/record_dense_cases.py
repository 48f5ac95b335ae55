"""Record dense cases with our eager backend into tests/golden/ours, for backends without experts.

Usage: python scripts/record_dense_cases.py
The official recordings, which all hold experts, are what the eager backend is tested against; these
hold the other backends to the eager one. A decision that falls otherwise when all weights move by
1e-5 would test luck, so such a case is not written.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from recorded import GOLDEN, options_of, replay_record  # noqa: E402
from tiny_models import MASK, fresh_model, masked_like, random_ids  # noqa: E402
from twotower import TwoTower, generate  # noqa: E402
from twotower.checkpoint import save_two_towers  # noqa: E402

CASES: dict[str, dict[str, object]] = {
    "dense_01": {"hybrid_override_pattern": "M*-MM*-"},
    "dense_02": {
        "hybrid_override_pattern": "*-M-*M", "hidden_size": 19, "head_dim": 5, "n_groups": 1,
        "num_key_value_heads": 1, "conv_kernel": 3, "ssm_state_size": 20, "intermediate_size": 37,
        "attention_bias": True, "use_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
LENGTHS = (1, 2, 17, 70)
MODES = ("ar", "mock_ar", "mask_diffusion", "speculative")
BLOCKS = [(8, 8), (16, 4), (24, 6), (40, 10)]  # size, steps


def teacher_forced(length: int) -> dict[str, Any]:
    """Blocks to denoise, in and beyond a tile of 16 tokens, and tokens to extend by."""
    half = {n: masked_like(random_ids(n, seed=length + n), seed=n, share=0.5) for n in (16, 24, 40)}
    blocks = {f"half{n}": {"tokens": block.tolist(), "t": 0.5} for n, block in half.items()}
    blocks["allmask16"] = {"tokens": [MASK] * 16, "t": 1.0}
    blocks["no_t"] = {"tokens": half[24].tolist(), "t": None}
    return {
        "denoise": blocks,
        "extend16_tokens": random_ids(16, seed=length).tolist(),
        "extend2_tokens": random_ids(2, seed=length).tolist(),
        "extend3_single_tokens": random_ids(3, seed=length).tolist(),
    }


def runs_of(prompt: list[int]) -> list[dict[str, Any]]:
    """What to generate from a prompt."""
    return [
        {"mode": mode, "prompt": prompt, "max_new_tokens": 48, "block_size": size,
         "steps_per_block": steps, "confidence_threshold": 0.5}
        for mode in MODES
        for size, steps in (BLOCKS if mode in ("mask_diffusion", "speculative") else BLOCKS[:1])
    ]  # fmt: skip


def texts(model: TwoTower, runs: list[dict[str, Any]]) -> list[tuple[list[int], int]]:
    """Tokens and denoiser passes of each run."""
    options = [options_of(run, run["mode"]) for run in runs]
    found = generate(model, [run["prompt"] for run in runs], options)
    return [(one.tokens, one.nfe) for one in found]


def moved(model: TwoTower) -> TwoTower:
    """The model with every weight a little elsewhere."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + 1e-5 * torch.randn_like(weight))
    return other


def record(name: str, sizes: dict[str, object]) -> None:
    """Write one case; RuntimeError if a decision is too close."""
    torch.manual_seed(0)
    model = fresh_model(seed=1, block_size=40, **sizes).requires_grad_(False)
    prompts = {f"p{length}": random_ids(length, seed=length).tolist() for length in LENGTHS}
    runs = [run for prompt in prompts.values() for run in runs_of(prompt)]
    found = texts(model, runs)
    if any(texts(moved(model), runs) != found for _ in range(5)):
        raise RuntimeError(f"{name}: a text depends on the last bits; change the seed")
    for run, (tokens, nfe) in zip(runs, found, strict=True):
        run["tokens"] = tokens
        if run["mode"] != "speculative":  # when a draft pays is the backend's affair
            run["nfe"] = nfe
    golden = {
        "case": name,
        "dtype": "float32",
        "prompts": prompts,
        "teacher_forced_inputs": {f"p{n}": teacher_forced(n) for n in LENGTHS if n > 1},
        "generate": {},
        "extra_generate": runs,
    }
    folder = GOLDEN / "ours" / name
    save_two_towers(model, folder)
    replayed = replay_record(model, golden)
    tensors = {one.key: one.ours.clone(memory_format=torch.contiguous_format) for one in replayed}
    save_file(tensors, folder / "golden.safetensors")
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    print(f"{folder}: {len(tensors)} tensors, {len(runs)} texts")


if __name__ == "__main__":
    for case, sizes in CASES.items():
        record(case, sizes)
