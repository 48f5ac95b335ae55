"""A guard between the model and the choice of tokens."""

import torch
from torch import Tensor


def require_finite(logits: Tensor) -> Tensor:
    """The logits themselves; ValueError if any is NaN or infinite, which argmax would hide."""
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "the model's logits are not finite; its weights are damaged or too large for its "
            "dtype: check the checkpoint, or load it with dtype=float32"
        )
    return logits
