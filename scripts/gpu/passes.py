"""How long do passes take on a GPU, and what speed-up over AR do they allow?

AR step and verification (with the choice of tokens where the backend makes it), denoiser pass and
extension of the shipped model (float32), of a dense model of 1B parameters and of the released
30B-A3B with both towers (bfloat16, and int8 weights), with random weights that are made on the
device; for 1, 4, 16 and 64 rows; eager, recorded (CUDA graphs), and both with compiled mixers and
norms. Beside each time stands what `twotower plan` predicts. There is a picture of them and,
after each size, a profile for each variant: `twotower plan --efficiency gpu-passes-graphs.toml`.

    PYTHONPATH=src python scripts/gpu/passes.py --size shipped dense-1b nano-30b
"""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from fit import Timed, error_of, fit_efficiency, write_profile
from picture import Record
from stage import Stage, reason_of, times_ms

from twotower import ContextCache, TwoTower, TwoTowerConfig, accelerate
from twotower.checkpoint.empty import Towers, allocate, build_empty
from twotower.checkpoint.files import shipped_folder
from twotower.checkpoint.inspect import describe_config
from twotower.cli.scripts import script_parser
from twotower.diffusion import Sampler
from twotower.engine.choosing import ChoosingBackend
from twotower.families import PRESETS, config_from_dict, read_config
from twotower.kernels import expert_products
from twotower.lab.plan.hardware import built_in, find_hardware
from twotower.lab.plan.inputs import PROFILES, Efficiency, uniform
from twotower.lab.plan.passes import ModelShape, Pass, PlanSetup, time_pass
from twotower.lab.report import new_figure
from twotower.layers.attention import Attention
from twotower.layers.mamba2 import Mamba2
from twotower.layers.mlp import MLP
from twotower.layers.moe import MoE
from twotower.layers.norms import RMSNorm
from twotower.model.precision import Scheme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE_1B: dict[str, object] = {  # Llama 3.2 1B
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
REHEARSED: Mapping[str, dict[str, object]] = {
    "dense-1b": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    },
    "nano-30b": {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4,
        "hybrid_override_pattern": "ME*E", "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_groups": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
        "intermediate_size": 16,
    },
}  # fmt: skip
INT8 = ", int8"  # behind a size's name: its matrices in a byte a number
SIZES = ("shipped", "dense-1b", f"dense-1b{INT8}", "nano-30b", f"nano-30b{INT8}")
ROWS = (1, 4, 16, 64)
VARIANTS = ("graphs", "eager", "graphs, compiled", "eager, compiled")
PUBLISHED_TOKENS_PER_NFE = (3.3, 5.0)  # of the released model, at two settings
_COMPILED = (Mamba2, Attention, MLP, MoE, RMSNorm)


@dataclass(frozen=True)
class Shape:
    """What the passes of one measurement have in common."""

    rows: int
    past: int
    block_size: int


def config_of(size: str, is_rehearsal: bool) -> TwoTowerConfig:
    """Sizes and layers; tiny ones to rehearse."""
    if size == "shipped":
        return read_config(shipped_folder())
    is_int8, size = size.endswith(INT8), size.removesuffix(INT8)
    values = dict(DENSE_1B if size == "dense-1b" else PRESETS[size])
    if is_int8:
        values["tie_word_embeddings"] = False  # embeddings are not quantised, nor their head
    return config_from_dict(values | (REHEARSED[size] if is_rehearsal else {}))


@torch.no_grad()
def random_model(
    config: TwoTowerConfig,
    dtype: torch.dtype,
    device: torch.device,
    towers: Towers = "both",
    scheme: Scheme | None = None,
) -> TwoTower:
    """A model whose random weights are made where they stay. Routers spread tokens over experts."""
    model = build_empty(config, towers, scheme)
    allocate(model, (dtype, dtype), (device, device))
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.dtype == torch.int8:
            weight.random_(-127, 128, generator=generator)
        elif not weight.is_floating_point():
            continue
        elif name.endswith("weight.scale") or name.endswith("proj.scale"):
            columns = model.get_submodule(name.removesuffix(".scale")).shape[-1]
            weight.fill_(columns**-0.5 / 73)  # the deviation of such numbers
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            weight.fill_(1.0)
        elif weight.ndim == 1 or "scale_shift" in name:
            weight.zero_()
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return model.requires_grad_(False).eval()


def compile_parts(model: TwoTower, compiler: str) -> None:
    """Compile what layers are made of, in place: one kernel where there were several."""
    torch._dynamo.config.recompile_limit = 256  # of sizes and roles; beyond it nothing is compiled
    for module in model.modules():
        # Experts whose tokens the host counts would be compiled anew for each count.
        is_counted = isinstance(module, MoE) and not expert_products.can_group(
            module.experts.up_proj
        )
        if isinstance(module, _COMPILED) and not is_counted:
            module.compile(backend=compiler)


def passes_of(model: TwoTower, shape: Shape) -> dict[str, tuple[Callable[[], object], int]]:
    """Each pass as decoding makes it, commits to the cache included, on a text of its own; and how
    many of it a call makes.
    """
    device, vocab = model.context_device, model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(4, vocab, (shape.rows, shape.past), generator=generator)
    tokens = prompt[:, : shape.block_size].to(device)
    block = torch.full((shape.rows, shape.block_size), model.config.mask_token_id, device=device)
    t, half = torch.full((shape.rows,), 0.5), torch.full((shape.rows,), shape.block_size // 2)

    def verify(cache: ContextCache) -> object:
        output = model.verify(cache, tokens)
        logits = model.context_head(output.hidden)
        cache.commit(output, half)
        return logits

    def ar_step(cache: ContextCache) -> object:
        model.extend(cache, tokens[:, :1])
        return model.next_logits(cache)

    num_steps, chooser = 1, model.backend
    if isinstance(chooser, ChoosingBackend):
        num_steps = chooser.decode_steps
        whole, greedy = half * 2, greedy_sampler(shape.rows)

        def ar_step(cache: ContextCache) -> object:
            alone = torch.ones_like(whole)
            return chooser.decode(cache, prompt[:, :1], alone, greedy, None, num_steps)

        def verify(cache: ContextCache) -> object:
            return chooser.decode(cache, prompt[:, : shape.block_size], whole, greedy, None, 1)

    calls: dict[str, Callable[[ContextCache], object]] = {
        "ar_step": ar_step,
        "denoise": lambda cache: model.denoise(block, cache.view(), t),
        "extend": lambda cache: model.extend(cache, tokens),
        "verify": verify,
    }
    # Pieces of this size are not recorded, and keep no memory.
    return {
        name: (
            partial(call, model.prefill(prompt, chunk_size=128)),
            num_steps if name == "ar_step" else 1,
        )
        for name, call in calls.items()
    }


def greedy_sampler(num_rows: int) -> Sampler:
    """Every row takes the best token."""
    zeros = torch.zeros(num_rows)
    ones, numbers = zeros + 1, zeros.long()
    return Sampler(
        temperature=zeros, top_k=numbers, top_p=ones, min_p=zeros, steps=numbers + 1,
        threshold=ones, mask_token_id=-1, has_min_p=False, has_ranks=False,
    )  # fmt: skip


def planned(
    size: str, shape: Shape, stage: Stage, efficiency: Efficiency
) -> tuple[PlanSetup, dict[str, Pass]]:
    """The same passes as the planner sees them."""
    compute = str(dtype_of(size, stage)).removeprefix("torch.")
    width: Any = "int8" if size.endswith(INT8) else compute
    setup = PlanSetup(
        shape=ModelShape.of(describe_config(config_of(size, stage.is_rehearsal), "random")),
        hardware=find_hardware(stage.args.hardware, built_in()),
        widths=uniform(width),
        efficiency=efficiency,
        compute=compute,
    )
    length = shape.block_size
    calls: dict[str, tuple[Any, int, int]] = {
        "ar_step": ("context", 1, 1), "denoise": ("denoiser", length, length),
        "extend": ("context", length, 0), "verify": ("context", length, length),
    }  # fmt: skip
    rows, past = shape.rows, shape.past
    return setup, {
        name: Pass(tower=tower, rows=rows, tokens=tokens, logits=logits, past=past)
        for name, (tower, tokens, logits) in calls.items()
    }


def predicted_ms(size: str, shape: Shape, stage: Stage, profile: str) -> dict[str, float]:
    """What the planner says of them."""
    setup, calls = planned(size, shape, stage, PROFILES[profile])
    return {n: round(time_pass(setup, call).seconds * 1e3, 4) for n, call in calls.items()}


def write_profiles(stage: Stage) -> None:
    """A profile of the planner for each variant, from all of its times."""
    for variant in VARIANTS:
        timed = []
        for one in stage.results:
            if one["variant"] == variant and "ms" in one and not one["size"].endswith(INT8):
                shape = Shape(one["rows"], one["past"], one["block_size"])
                setup, calls = planned(one["size"], shape, stage, PROFILES["limit"])
                ms = one["ms"]
                timed += [Timed(setup, c, ms[n]["median"] / 1e3) for n, c in calls.items()]
        if timed:
            found, machine = fit_efficiency(timed), stage.record["machine"]
            off = math.expm1(error_of(found, timed))
            name = variant.replace(", ", "-")
            write_profile(
                found,
                stage.args.out.with_name(f"{stage.args.out.stem}-{name}.toml"),
                f"{variant}, {len(timed)} passes on {machine['gpu']}: off by {off:.0%} in the mean",
            )


def dtype_of(size: str, stage: Stage) -> torch.dtype:
    """Of weights and arithmetic."""
    is_float32 = size == "shipped" or stage.is_rehearsal
    return torch.float32 if is_float32 else torch.bfloat16


def speed_up(ms: Mapping[str, float], block_size: int, tokens_per_nfe: float) -> float:
    """Diffusion over AR decoding of the same engine: a block is so many passes and one extension,
    which reads it back; AR takes a step for each of its tokens.
    """
    block_ms = block_size / tokens_per_nfe * ms["denoise"] + ms["extend"]
    return round(block_size * ms["ar_step"] / block_ms, 3)


def cycle_steps(ms: Mapping[str, float]) -> float:
    """Tokens a cycle of one draft pass and a verification from which on lossless decoding pays."""
    return round((ms["denoise"] + ms["verify"]) / ms["ar_step"], 3)


def conclusions(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Possible speed-ups of every size, variant and number of rows that has all passes."""
    found = []
    for one in results:
        if "ms" not in one:
            continue
        ms = {name: times["median"] for name, times in one["ms"].items()}
        found.append(
            {key: one[key] for key in ("size", "variant", "rows")}
            | {
                "speed_up_over_ar": {
                    f"{tokens} tokens/NFE": speed_up(ms, one["block_size"], tokens)
                    for tokens in PUBLISHED_TOKENS_PER_NFE
                },
                "tokens_per_cycle_to_break_even": cycle_steps(ms),
            }
        )
    return found


@torch.no_grad()
def measure(stage: Stage, model: TwoTower, variant: str, shape: Shape) -> dict[str, Any]:
    """The times of one variant and number of rows; why there are none, where memory is short."""
    repeats = 2 if stage.is_rehearsal else 12
    try:
        ready = accelerate(model, "graphs" if "graphs" in variant else "eager")
        calls = passes_of(ready, shape)
        found = {n: times_ms(call, repeats, stage.device, c) for n, (call, c) in calls.items()}
        return {"ms": found}
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        return {"failed": reason_of(error)}


def run_size(stage: Stage, size: str) -> None:
    """All measurements of one model, the rows within a variant; compiled ones last."""
    config = config_of(size, stage.is_rehearsal)
    rows = (1, 4) if stage.is_rehearsal else ROWS
    wanted = [
        (variant, count)
        for variant in stage.args.variant
        if variant == "graphs" or not size.endswith(INT8)
        for count in rows
        if not stage.has(size=size, variant=variant, rows=count)
    ]
    if not wanted or stage.is_over:
        return
    scheme = Scheme(weights="int8") if size.endswith(INT8) else None
    model = random_model(config, dtype_of(size, stage), stage.device, scheme=scheme)
    is_compiled = False
    for variant, count in wanted:
        if stage.is_over:
            break
        if "compiled" in variant and not is_compiled:
            # The rehearsal traces what the compiler would get, and compiles nothing.
            compile_parts(model, "eager" if stage.is_rehearsal else "inductor")
            is_compiled = True
        shape = Shape(count, 24 if stage.is_rehearsal else 512, config.block_size)
        found = measure(stage, model, variant, shape)
        profiles = ("graph-gpu" if "graphs" in variant else "eager-gpu", "limit")
        predicted = {p: predicted_ms(size, shape, stage, p) for p in profiles}
        values = {"size": size, "variant": variant, "rows": count, "past": shape.past}
        stage.add(**values, block_size=shape.block_size, **found, predicted_ms=predicted)
        stage.save(conclusions=conclusions(stage.results))
        gc.collect()
        if stage.device.type == "cuda":
            torch.cuda.empty_cache()


def paint(record: Record) -> "Figure":
    """Measured times against predicted ones, a panel for each size."""
    measured = [one for one in record["results"] if "ms" in one]
    sizes = [size for size in SIZES if any(one["size"] == size for one in measured)]
    figure = new_figure(max(7, 4.5 * len(sizes)), 4.6)
    figure.suptitle("Passes: measured times against what the planner says")
    for place, size in enumerate(sizes, 1):
        axes = figure.add_subplot(1, len(sizes), place, title=size, xscale="log", yscale="log")
        axes.set(xlabel="predicted, ms", ylabel="measured, ms")
        for variant in VARIANTS:
            own = [one for one in measured if (one["size"], one["variant"]) == (size, variant)]
            points = [
                (next(iter(one["predicted_ms"].values()))[name], times["median"])
                for one in own
                for name, times in one["ms"].items()
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), label=variant, s=14)
        axes.set_xlim(axes.get_xlim()[0] / 3, axes.get_xlim()[1] * 3)  # equal predictions, too
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="0.6", linewidth=1)
        axes.legend()
    return figure


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="models")
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="backends and precisions",
    )
    parser.add_argument("--hardware", default="h200", help="name of the machine in `twotower plan`")
    stage = Stage("passes", parser, paint)
    for size in stage.args.size:
        run_size(stage, size)
        gc.collect()  # the next model needs the memory
        write_profiles(stage)
    stage.close(conclusions=conclusions(stage.results))
    for one in stage.record["conclusions"]:
        print(one)


if __name__ == "__main__":
    main()
