"""Write the tables of docs/cost.md: what lossless drafts must yield to pay, and what the published
tokens per pass are worth on one H200, by the planner.

python scripts/cost_table.py
"""

from collections.abc import Iterator

from page_table import PageTable

from twotower.checkpoint.inspect import describe_config
from twotower.config import DraftSpec, TwoTowerConfig
from twotower.families import PRESETS, config_from_dict
from twotower.lab.plan.hardware import find_hardware
from twotower.lab.plan.inputs import PROFILES, uniform
from twotower.lab.plan.options import known_hardware
from twotower.lab.plan.passes import ModelShape, Pass, PlanSetup, time_pass
from twotower.model.thin import spread, thin_blocks, thin_config

PAST, BLOCK, ROWS = 512, 8, (1, 4, 16, 64)
PUBLISHED = (3.3, 5.0)  # tokens/NFE of the released model, at two settings
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_parameters": {"rope_theta": 500000.0},
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
MODELS = {
    "dense 8B (Llama 3.1)": LLAMA_8B,
    "30B-A3B (the released one)": PRESETS["nano-30b"],
    "30B-A3B (Qwen3)": QWEN3_30B,
}


def with_denoiser(config: TwoTowerConfig, layers: int | None) -> TwoTowerConfig:
    """The configuration with a thin denoiser, or the full one that it has."""
    if layers is None:
        return config
    reads = spread(thin_blocks(config.context), layers)
    return thin_config(config, reads, BLOCK, DraftSpec(vocab_size=min(32768, config.vocab_size)))


def rows() -> Iterator[str]:
    """The table's lines."""
    yield "| model | drafts | memory, context tower = 1 |" + "".join(
        f" {count} row{'s' * (count > 1)} |" for count in ROWS
    )
    yield "|---|---|---|" + "---|" * len(ROWS)
    hardware = find_hardware("h100-sxm", known_hardware(None))
    for name, values in MODELS.items():
        base = config_from_dict(values)
        for drafts, layers, passes in (
            ("looked up in the text", 1, 0), ("a thin denoiser, 3 blocks", 3, 1),
            ("a full second tower", None, 1),
        ):  # fmt: skip
            shape = ModelShape.of(describe_config(with_denoiser(base, layers), name))
            setup = PlanSetup(
                shape=shape, hardware=hardware, widths=uniform("bfloat16"),
                efficiency=PROFILES["limit"], compute="bfloat16",
            )  # fmt: skip
            sizes = {side: sum(counts.values()) for side, counts in shape.parameters.items()}
            memory = 1 + passes * sizes["denoiser"] / sizes["context"]
            cells = [f"{cycle_cost(setup, count, passes):.2f}" for count in ROWS]
            yield f"| {name} | {drafts} | {memory:.2f} | {' | '.join(cells)} |"


def cycle_cost(setup: PlanSetup, count: int, passes: int) -> float:
    """AR steps that a draft and its verification take."""

    def seconds(tower: str, tokens: int) -> float:
        call = Pass(tower=tower, rows=count, tokens=tokens, logits=tokens, past=PAST)  # type: ignore[arg-type]
        return time_pass(setup, call).seconds

    step = seconds("context", 1)
    return (seconds("context", BLOCK) + passes * seconds("denoiser", BLOCK)) / step


def speed_rows() -> Iterator[str]:
    """The lines of the table of the released model on one H200, with both towers; weights in
    bfloat16 where nothing else is said.
    """
    yield "| efficiency | |" + "".join(f" {n} row{'s' * (n > 1)} |" for n in ROWS)
    yield "|---|---|" + "---|" * len(ROWS)
    config = config_from_dict(PRESETS["nano-30b"])
    for profile, width in (
        ("limit", "bfloat16"), ("graph-gpu", "bfloat16"), ("graph-gpu", "int8"),
        ("eager-gpu", "bfloat16"),
    ):  # fmt: skip
        setup = PlanSetup(
            shape=ModelShape.of(describe_config(config, "nano-30b")),
            hardware=find_hardware("h200", known_hardware(None)), widths=uniform(width),  # type: ignore[arg-type]
            efficiency=PROFILES[profile], compute="bfloat16",
        )  # fmt: skip
        name = profile if width == "bfloat16" else f"{profile}, {width}"
        found = [block_times(setup, count, config.block_size) for count in ROWS]
        steps, passes = ([one[i] * 1e3 for one in found] for i in range(2))
        yield _line(name, "AR step, ms", steps)
        yield _line(name, "pass of a block, ms", passes)
        for tokens in PUBLISHED:
            worth = [speed_up(one, config.block_size, tokens) for one in found]
            yield _line(name, f"diffusion over AR at {tokens:g} tokens/NFE", worth)


def block_times(setup: PlanSetup, count: int, block: int) -> tuple[float, float, float]:
    """Seconds of an AR step, of a denoiser pass over a block and of its extension."""
    calls = ("context", 1, 1), ("denoiser", block, block), ("context", block, 0)
    step, denoise, extend = (
        time_pass(setup, Pass(tower=t, rows=count, tokens=n, logits=k, past=PAST)).seconds  # type: ignore[arg-type]
        for t, n, k in calls
    )
    return step, denoise, extend


def speed_up(seconds: tuple[float, float, float], block: int, tokens_per_nfe: float) -> float:
    """A block is so many passes and one extension; AR takes a step for each of its tokens."""
    step, denoise, extend = seconds
    return block * step / (block / tokens_per_nfe * denoise + extend)


def _line(profile: str, what: str, values: list[float]) -> str:
    return f"| {profile} | {what} | {' | '.join(f'{value:.2f}' for value in values)} |"


def text_of(lines: Iterator[str]) -> str:
    """A table's lines as text."""
    return "".join(f"{line}\n" for line in lines)


TABLE = PageTable("cost.md", "cost", "cost_table.py", lambda: text_of(rows()))
SPEED_TABLE = PageTable("cost.md", "speed", "cost_table.py", lambda: text_of(speed_rows()))

if __name__ == "__main__":
    for one in (TABLE, SPEED_TABLE):
        one.write()
        print(one.make())
