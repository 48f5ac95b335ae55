"""Tiny backbones with thin denoisers, and answers to train them on."""

import torch
from torch import Tensor

from tiny_models import fresh_model, prompts_of, random_model
from twotower import TwoTower
from twotower.adapt.answers import Answer
from twotower.adapt.features import Features, attended
from twotower.checkpoint.denoiser import with_new_denoiser
from twotower.config import DraftSpec
from twotower.families import config_from_dict
from twotower.model.thin import thin_config

LLAMA: dict[str, object] = {
    "model_type": "qwen3", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "eos_token_id": 66, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
IDS = torch.tensor([2, 5, 6, 9, 11, 17, 18, 30, 31, 40, 52, 66])


def backbone(seed: int = 0) -> TwoTower:
    return random_model(config_from_dict(LLAMA), seed)


def with_values(model: TwoTower) -> TwoTower:
    """A denoiser of which every part matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("context_", "lm_head")) and "embeddings" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def unordered() -> TwoTower:
    """A backbone whose attention knows no positions: its Mamba layers do."""
    return fresh_model(hybrid_override_pattern="M-*-M-*-", vocab_size=67, hidden_size=32)


def thin(model: TwoTower, ids: Tensor | None = IDS, **spec: object) -> TwoTower:
    values = {"vocab_size": None if ids is None else len(ids), "bigram_rank": 4, **spec}
    draft = DraftSpec(**values)  # type: ignore[arg-type]
    return with_values(
        with_new_denoiser(model, thin_config(model.config, (2, 3, 6), 5, draft), ids, 0)
    )


def features_of(model: TwoTower) -> Features:
    return Features(attended(model.config.context, model.config.reads))


def answers(count: int) -> list[Answer]:
    prompts = prompts_of([3 + i % 5 for i in range(count)])
    return [
        Answer(number=i, task="t", prompt=prompt, tokens=prompts_of([9 + i % 7], seed=i)[0])
        for i, prompt in enumerate(prompts)
    ]
