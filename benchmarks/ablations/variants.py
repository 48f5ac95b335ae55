"""Which denoisers are trained, and with what: each differs from the base in what its name says."""

from pathlib import Path

from twotower.train.options import TrainOptions
from twotower.train.prepare import PrepareOptions

CATEGORIES = ("code", "editing", "tools", "knowledge", "refusal")
SEQUENCE_LENGTH = 192
# A multiple of every block size, so that all variants read the same rows.
ALIGN = 32
BASE = "base"
VARIANTS: dict[str, dict[str, object]] = {
    BASE: {},
    "tied": {"towers": "tied"},
    "no-time": {"condition_on": "none"},
    "block-8": {"block_size": 8, "denoised_blocks_per_row": 12},
    "block-32": {"block_size": 32, "denoised_blocks_per_row": 3},
    "bidirectional": {"bidirectional_mamba": True},
    "tied-ar": {"towers": "tied-ar"},
    "t": {"condition_on": "t"},
    # 4 blocks of 32, then 4 of 16: as many denoised tokens in all as the base's 6 of 16.
    "32-then-16": {"early_block_size": 32, "denoised_blocks_per_row": 4},
}
TABLES: dict[str, tuple[str, ...]] = {
    "towers": (BASE, "tied", "tied-ar"),
    "conditioning": (BASE, "t", "no-time"),
    "mamba": (BASE, "bidirectional"),
    "blocks": ("block-8", BASE, "block-32", "32-then-16"),
}


def shard_options(
    out: Path, tokens: int, denoiser_tokens: int
) -> tuple[PrepareOptions, PrepareOptions]:
    """The backbone's shard, packed, and the denoisers', aligned, with the same tokenizer."""
    mixture = tuple(f"{category}=1" for category in CATEGORIES)
    packed = PrepareOptions(
        output=out / "packed", tokens=tokens, weights=mixture, seed=0, vocab_size=1024
    )
    aligned = PrepareOptions(
        output=out / "aligned", tokens=denoiser_tokens, weights=mixture, seed=1, align=ALIGN,
        tokenizer=packed.output,
    )  # fmt: skip
    return packed, aligned


def backbone_options(out: Path, steps: int, seed: int, threads: int, compile: bool) -> TrainOptions:
    """Next-token training of the small backbone that all denoisers start from."""
    return TrainOptions(
        recipe="backbone",
        data=out / "packed",
        output=out / "backbone",
        config=Path(__file__).with_name("backbone.json"),
        learning_rate=3e-3,
        warmup_steps=60,
        decay_fraction=0.5,
        compile=compile,
        batch_size=16,
        **_shared(steps, seed, threads),
    )


def denoiser_options(name: str, out: Path, steps: int, seed: int, threads: int) -> TrainOptions:
    """Denoiser training of one variant on the same rows, for as many steps as the others."""
    chosen: dict[str, object] = {
        "block_size": 16,
        "denoised_blocks_per_row": 6,
        "condition_on": "masked-fraction",
        **VARIANTS[name],
    }
    return TrainOptions(
        recipe="denoiser",
        data=out / "aligned",
        output=out / name,
        init=out / "backbone" / "export",
        targets="completion",
        mask_rate_per="block",
        fully_masked_fraction=0.2,
        learning_rate=2e-3,
        warmup_steps=30,
        decay_fraction=0.5,
        batch_size=8,  # many small steps: the denoiser's time is short
        **chosen,
        **_shared(steps, seed, threads),
    )


def _shared(steps: int, seed: int, threads: int) -> dict[str, object]:
    return {
        "steps": steps,
        "seed": seed,
        "threads": threads,
        "optimizer": "muon",
        "sequence_length": SEQUENCE_LENGTH,
        "eval_every": max(steps // 5, 1),
        "eval_rows": 96,
        "checkpoint_every": max(steps // 5, 1),
        "keep_checkpoints": 1,
        "tensorboard": False,
    }
