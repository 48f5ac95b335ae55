"""The models of a race: the shipped one, and larger ones with random weights.

Random models answer only how long a pass takes. Their vocabulary is not a power of two, because
PyTorch's float32 product is far slower at 8,192 outputs than beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from twotower.checkpoint import export_transformers
from twotower.checkpoint.gguf import Precision, export_gguf
from twotower.config import TwoTowerConfig
from twotower.families import config_from_dict
from twotower.lab.race.contest import rival_name
from twotower.lab.race.rivals import Rival, load_llama_cpp, load_transformers
from twotower.model import TwoTower
from twotower.model.initialise import copy_context_to_denoiser, randomise

LLAMA_CPP_DTYPES: tuple[Precision, ...] = ("float32", "float16", "q8_0")
_CONFIGS: dict[str, dict[str, object]] = {
    "32M": {
        "hybrid_override_pattern": "M*-" * 6,
        "hidden_size": 512,
        "vocab_size": 8000,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
        "ssm_state_size": 64,
        "n_groups": 1,
        "conv_kernel": 4,
        "intermediate_size": 1664,
    },
    "160M": {
        "hybrid_override_pattern": "M*-" * 8,
        "hidden_size": 1024,
        "vocab_size": 8000,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "intermediate_size": 4224,
    },
}


def random_config(size: str, block_size: int) -> TwoTowerConfig:
    """The configuration of a random model; it never ends a text, so that all write alike."""
    values = _CONFIGS[size] | {"block_size": block_size, "eos_token_id": None}
    return config_from_dict(values)


def random_model(config: TwoTowerConfig, seed: int, dtype: torch.dtype) -> TwoTower:
    """Both towers with seeded random weights, ready to decode."""
    model = TwoTower(config)
    randomise(model, seed)
    copy_context_to_denoiser(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


@contextmanager
def open_rivals(
    model: TwoTower | None, threads: int, dtype: torch.dtype
) -> Iterator[tuple[list[Rival], list[str]]]:
    """Rivals on the weights of the context tower, and a line for each that cannot run.

    The files they need are written for them and removed with them. None: no rivals are wanted.
    """
    rivals: list[Rival] = []
    missing: list[str] = []
    with TemporaryDirectory(prefix="twotower-race-") as folder:
        try:
            if model is not None:
                _open_all(model, Path(folder), (threads, dtype), rivals, missing)
            yield rivals, missing
        finally:
            for rival in rivals:
                rival.close()


def _open_all(
    model: TwoTower,
    folder: Path,
    how: tuple[int, torch.dtype],
    rivals: list[Rival],
    missing: list[str],
) -> None:
    threads, dtype = how
    try:
        export_transformers(model, folder / "transformers")
        name = str(dtype).removeprefix("torch.")
        rivals.append(load_transformers(folder / "transformers", threads, name))  # type: ignore[arg-type]  # checked there
    except ValueError as error:  # not installed, or a model that it cannot represent
        missing.append(f"transformers: {error}")
    for kind in LLAMA_CPP_DTYPES:
        file = folder / f"{kind}.gguf"
        try:
            export_gguf(model, file, dtype=kind)
            rivals.append(load_llama_cpp(file, threads))
        except ValueError as error:
            missing.append(f"{rival_name('llama.cpp', kind)}: {error}")
