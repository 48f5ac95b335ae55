"""Small random models whose every parameter matters: no zero, no one, no symmetric default."""

import functools
import math

import torch
from torch import Tensor

from twotower import ContextCache, TwoTower, TwoTowerConfig
from twotower.families import config_from_dict
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.specs import MoESpec

MASK = 3
PATTERN = "M*E-M*"  # each kind of layer, Mamba and attention twice


def tiny_config(**changes: object) -> TwoTowerConfig:
    """A configuration with grouped heads and channels, 4 experts, vocabulary 41, block size 4."""
    values: dict[str, object] = {
        "hybrid_override_pattern": PATTERN,
        "hidden_size": 16,
        "vocab_size": 41,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "conv_kernel": 4,
        "intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
        "eos_token_id": None,
        "block_size": 4,
    }
    return config_from_dict(values | changes)


def tiny_moe(**changes: object) -> MoESpec:
    """The experts of `tiny_config`."""
    spec = tiny_config(**changes).context.shared_spec(MoESpec)
    assert spec is not None
    return spec


@functools.cache
def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> TwoTower:
    """A model in eval mode, shared by all who ask for the same one: tests must not change it."""
    return fresh_model(seed, dtype, **changes)


def fresh_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> TwoTower:
    """A model of one's own."""
    return random_model(tiny_config(**changes), seed, dtype)


def random_model(
    config: TwoTowerConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> TwoTower:
    """A model of a configuration, in eval mode."""
    model = TwoTower(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_values(name, tensor, generator))
    return model.to(dtype).eval()


def _values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a sensible size for the parameter `name`."""
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("A_log"):
        return 0.5 * noise
    if name.endswith("dt_bias"):
        return noise - 1.0
    if name.endswith("conv1d.weight"):
        return 0.6 * noise
    if "scale_shift_tables" in name:
        return 0.4 * noise + torch.tensor([0.0, 0.0, 1.0]).unsqueeze(1)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return 1.0 + 0.2 * noise
    if name.endswith(("embeddings.weight", "lm_head.weight")):
        return noise
    return noise * (0.2 if tensor.ndim == 1 else 1.0 / math.sqrt(tensor.shape[-1]))


def random_ids(*shape: int, seed: int = 0, vocab_size: int = 41) -> Tensor:
    """Token ids without the special ones and the mask token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(MASK + 1, vocab_size, shape, generator=generator)


def masked_like(ids: Tensor, seed: int = 0, share: float = 0.6) -> Tensor:
    """A copy in which about `share` of the tokens are the mask token."""
    generator = torch.Generator().manual_seed(seed)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < share, MASK)


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    return [random_ids(n, seed=seed + 97 * i).tolist() for i, n in enumerate(lengths)]


def row_state(cache: ContextCache, row: int) -> list[Tensor]:
    """Everything the cache knows of one row, without padding."""
    found = []
    for state in cache.layers:
        if isinstance(state, KV):
            found += [part[row, : int(cache.lengths[row])] for part in state]
        elif isinstance(state, MambaState):
            found += [part[row] for part in state]
    assert cache.last_hidden is not None
    return [*found, cache.last_hidden[row]]
