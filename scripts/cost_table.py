"""Write the tables of docs/cost.md: what lossless drafts must yield to pay, by the planner.

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
from twotower.model.thin import blocks_of, spread, thin_config

PAST, BLOCK, ROWS = 512, 8, (1, 4, 16, 64)
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_parameters": {"rope_theta": 500000.0},
}  # fmt: skip
MODELS = {"dense 8B (Llama 3.1)": LLAMA_8B, "30B-A3B (the released one)": PRESETS["nano-30b"]}


def with_denoiser(config: TwoTowerConfig, layers: int | None) -> TwoTowerConfig:
    """The configuration with a thin denoiser, or the full one that it has."""
    if layers is None:
        return config
    reads = spread(blocks_of(config.context), layers)
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


def table() -> str:
    """The table's lines as text."""
    return "".join(f"{line}\n" for line in rows())


TABLE = PageTable("cost.md", "cost", "cost_table.py", table)

if __name__ == "__main__":
    TABLE.write()
