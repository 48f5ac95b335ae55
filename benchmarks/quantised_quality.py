"""What does each precision keep of AR accuracy and of diffusion, and what if all were quantised?

Limit: the same checkpoint in float32. Every setting answers the same held-out prompts of the suite.
Settings below the first five round a model's values to 4 bits and write them in full precision, so
that matrices are reached which `twotower convert` leaves alone. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.checkpoint import convert, load_checkpoint, save_two_towers
from twotower.checkpoint.files import shipped_folder
from twotower.checkpoint.quantize import quantise
from twotower.cli.evaluate import EvaluateOptions, run_suite
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.kernels.quantised import dequantise
from twotower.model.precision import Scheme, weight_bits

INT4 = Scheme(weights="int4")


class Setting(NamedTuple):
    """A model to measure: quantised by a scheme, or with the named matrices rounded to 4 bits."""

    name: str
    dtype: str = "float32"
    scheme: Scheme | None = None
    is_quantised: Callable[[str, Tensor], bool] | None = None
    round_matrix: Callable[[Tensor], Tensor] | None = None


def in_groups(matrix: Tensor) -> Tensor:
    """As `--quantization int4`: groups of 32, asymmetric; whole rows where none fit."""
    size = 32 if matrix.shape[-1] % 32 == 0 else matrix.shape[-1]
    return dequantise(quantise(matrix, 4, size), torch.float32)


def in_rows(matrix: Tensor) -> Tensor:
    """The plainest 4 bits: 15 steps between plus and minus the row's largest number."""
    step = matrix.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return (matrix / step).round() * step


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() > 1


def is_projection(name: str, tensor: Tensor) -> bool:
    return tensor.dim() > 1 and weight_bits(name, tensor.shape, INT4) == 4


def with_also(part: str) -> Callable[[str, Tensor], bool]:
    """What int4 quantises, and the matrices of one more part."""
    own = {
        "heads": ("lm_head.", "context_lm_head."),
        "embeddings": ("context_tower.embeddings.", "denoiser_tower.embeddings."),
        "time": ("t_embedder.", "t_block.", "scale_shift_tables."),
    }[part]
    return lambda name, tensor: (
        is_projection(name, tensor) or (tensor.dim() > 1 and name.startswith(own))
    )


SETTINGS = (
    Setting("float32"),
    Setting("bfloat16", dtype="bfloat16"),
    Setting("int8", scheme=Scheme(weights="int8")),
    Setting("int8, int8 activations", scheme=Scheme(weights="int8", activations="int8")),
    Setting("int4", scheme=INT4),
    Setting("int4, groups of 64", scheme=Scheme(weights="int4", group_size=64)),
    Setting("int4 + 4-bit heads", is_quantised=with_also("heads"), round_matrix=in_groups),
    Setting(
        "int4 + 4-bit embeddings", is_quantised=with_also("embeddings"), round_matrix=in_groups
    ),
    Setting("int4 + 4-bit time", is_quantised=with_also("time"), round_matrix=in_groups),
    Setting("4 bits everywhere", is_quantised=is_matrix, round_matrix=in_groups),
    Setting("4 bits a row, projections", is_quantised=is_projection, round_matrix=in_rows),
    Setting("4 bits a row everywhere", is_quantised=is_matrix, round_matrix=in_rows),
)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--model", help="checkpoint in full precision; without it the shipped model"
    )
    parser.add_argument("--items", type=int, default=25, help="prompts of each category")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences decoded at the same time"
    )
    parser.add_argument(
        "--verify-threshold",
        type=float,
        default=0.0,
        help="of diffusion; 0 accepts all tokens of a block",
    )
    parser.add_argument("--only", nargs="*", help="names of settings to measure; without it all")
    args = parser.parse_args()
    source = Path(args.model) if args.model else shipped_folder()
    records = []
    by_name = {setting.name: setting for setting in SETTINGS}
    for setting in [by_name[name] for name in args.only or by_name]:
        with tempfile.TemporaryDirectory() as folder:
            record = measure(setting, source, Path(folder) / "model", args)
        records.append(record)
        print(row(record), flush=True)
    asked = {name: getattr(args, name) for name in ("items", "batch_size", "verify_threshold")}
    print(
        json.dumps(
            {"recorded": recorded(), **asked, "weights_sha256": digest(source), "settings": records}
        )
    )


def digest(folder: Path) -> str:
    """Which weights were measured: of the files' bytes, in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def measure(
    setting: Setting, source: Path, folder: Path, args: argparse.Namespace
) -> dict[str, object]:
    """Accuracy of both modes at a setting, and passes that diffusion needed."""
    write(setting, source, folder)
    options = EvaluateOptions(
        model=str(folder),
        items=args.items,
        batch_size=args.batch_size,
        modes="ar,diffusion",
        decoding={"verify_threshold": args.verify_threshold},
        dtype=setting.dtype,  # type: ignore[arg-type]  # two of its values
        threads=torch.get_num_threads(),
    )
    results, _ = run_suite(options)
    modes = results["modes"]
    assert isinstance(modes, dict)
    kept = ("n", "correct", "accuracy", "retention", "retention_interval", "tokens_per_nfe", "nfe")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    is_rounded = setting.is_quantised is not None  # such a file has full precision
    return {
        "setting": setting.name,
        "file_mb": None if is_rounded else round(size / 1e6, 2),
        **{mode: {name: values[name] for name in kept} for mode, values in modes.items()},
    }


def write(setting: Setting, source: Path, folder: Path) -> None:
    """The checkpoint of a setting, with the source's tokenizer and defaults."""
    convert(source, folder, "released", scheme=setting.scheme)
    if setting.is_quantised is None or setting.round_matrix is None:
        return
    model = load_checkpoint(source)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if setting.is_quantised(name, tensor):
                rows = tensor.reshape(-1, tensor.shape[-1])
                tensor.copy_(setting.round_matrix(rows).view_as(tensor))
    save_two_towers(model, folder)


def row(record: dict[str, object]) -> str:
    ar, diffusion = record["ar"], record["diffusion"]
    assert isinstance(ar, dict) and isinstance(diffusion, dict)
    low, high = diffusion["retention_interval"]
    size = "" if record["file_mb"] is None else f"{record['file_mb']} MB"
    return (
        f"{record['setting']:26s} {size:>8s}  AR {ar['correct']}/{ar['n']}"
        f"  diffusion {diffusion['correct']}/{diffusion['n']}"
        f"  kept {diffusion['retention']:.1%} ({low:.1%} to {high:.1%})"
        f"  {diffusion['tokens_per_nfe']:.2f} tokens/NFE"
    )


if __name__ == "__main__":
    main()
