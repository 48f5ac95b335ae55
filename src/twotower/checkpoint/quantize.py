"""How config.json records a quantised checkpoint; weights in fewer bits by torchao.

Which weights are quantised is `model.precision`'s business, how products run is
`kernels.quantised`'s; neither needs torchao, so a quantised checkpoint runs without it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from twotower.families import read_json
from twotower.kernels.quantised import Bits, Quantised, pack_halves
from twotower.model.precision import Scheme

CONFIG_KEY = "quantization_config"
_METHOD = "twotower"  # another reader of the released layout refuses the name, and rightly


def quantization_entry(scheme: Scheme | None) -> dict[str, object]:
    """What config.json holds of a scheme: nothing for a full-precision model."""
    if scheme is None:
        return {}
    values = {
        "weights": scheme.weights,
        "group_size": scheme.group_size,
        "activations": scheme.activations,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return {CONFIG_KEY: {"quant_method": _METHOD, **given}}


def read_scheme(path: Path) -> Scheme | None:
    """The scheme in a config.json, or in that of a folder; None at full precision.

    ValueError (one line) for one that is damaged or of another library.
    """
    file = path / "config.json" if path.is_dir() else path
    values = read_json(file).get(CONFIG_KEY)
    if values is None:
        return None
    try:
        return _parse(values)
    except ValueError as error:
        raise ValueError(f"{file}: {CONFIG_KEY}: {error}") from None


def _parse(values: object) -> Scheme:
    if not isinstance(values, Mapping):
        raise ValueError(f"{values!r} must be an object; restore the file")
    fields = dict(values)
    if (method := fields.pop("quant_method", None)) != _METHOD:
        raise ValueError(
            f"quant_method={method!r} is not supported, only {_METHOD!r}; quantise the "
            "full-precision one with: twotower convert SOURCE TARGET --quantization int8"
        )
    known = ("weights", "group_size", "activations")
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"{unknown[0]!r} is unknown; allowed are {', '.join(known)}")
    if "weights" not in fields:
        raise ValueError("weights is missing; add int8 or int4, as the checkpoint was written")
    return Scheme(**fields)


def quantise(values: Tensor, bits: Bits, group_size: int | None) -> Quantised:
    """Finite values (N, K) as 8 bits with a scale per row, or 4 with groups of it, by torchao."""
    full = values.detach().float()
    return _eight_bits(full) if bits == 8 else _four_bits(full, group_size or full.shape[-1])


def _eight_bits(full: Tensor) -> Quantised:
    """Symmetric: the row's largest number becomes 127."""
    torchao = import_torchao()
    made = torchao.Int8Tensor.from_hp(full, torchao.PerRow())
    return Quantised(made.qdata, made.scale)


def _four_bits(full: Tensor, group_size: int) -> Quantised:
    """Asymmetric: 16 steps from the group's smallest number to its largest, 0 among them."""
    torchao = import_torchao()
    block = (1, group_size)
    scale, offset = torchao.choose_qparams_affine(
        full,
        torchao.MappingType.ASYMMETRIC,
        block,
        torch.uint8,
        quant_min=0,
        quant_max=15,
        eps=1e-6,
        scale_dtype=torch.bfloat16,  # as it is stored, so that numbers are rounded with it
        zero_point_dtype=torch.int32,
    )
    numbers = torchao.quantize_affine(
        full, block, scale.float(), offset, torch.uint8, quant_min=0, quant_max=15
    )
    shape = (len(full), -1)
    zero = (8 - offset.float()) * scale.float()
    return Quantised(pack_halves(numbers), scale.view(shape), zero.bfloat16().view(shape))


def import_torchao() -> ModuleType:
    """torchao's quantization module; ImportError (one line) if it is not installed."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it reports GPU libraries that this machine has no use for
    try:
        from torchao import quantization
    except ImportError:
        raise ImportError('torchao is not installed: pip install ".[quant]"') from None
    finally:
        logging.disable(previous)
    found: ModuleType = quantization
    return found
