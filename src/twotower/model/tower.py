"""What the two towers have in common: embeddings, layers, final norm."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twotower.config import TowerConfig
from twotower.kernels.mixing import Added
from twotower.layers.norms import RMSNorm
from twotower.layers.rope import Rotation, rotation
from twotower.model.layer import Layer


class Tower(nn.Module):
    """Embeddings, layers, final norm; how the layers are run is the subclass's business."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config, self._rotary = config, config.rotary
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, config) for spec in config.layers)
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)

    def rotation(
        self,
        start: Tensor | int,
        length: int,
        device: torch.device,
        depths: Tensor | None = None,
    ) -> Rotation | None:
        """How queries and keys of `length` tokens after `start` others, per row (B,) or of all
        rows, are turned; None without rotary layers. depths (B, L): tokens of these before each,
        where that is not its place.
        """
        if self._rotary is None:
            return None
        positions = torch.arange(length, device=device).unsqueeze(0) if depths is None else depths
        first = start.to(device).unsqueeze(1) if isinstance(start, Tensor) else start
        return rotation(*self._rotary, positions + first)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) -> the residual stream (..., D); float32 when the configuration keeps it so."""
        h = self.look_up(ids)
        return h.float() if self.config.residual_in_fp32 else h

    def look_up(self, ids: Tensor) -> Tensor:
        """ids (...) -> their embeddings (..., D) in the dtype of the other weights: a model whose
        matrices are packed keeps the table in its file's.
        """
        found: Tensor = self.embeddings(ids)
        return found.to(self.norm_f.weight.dtype)

    def each_layer(self) -> Iterator[Layer]:
        """The layers in order, with their type."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def finish(self, h: Tensor, added: Added | None) -> Tensor:
        """The final norm of the residual stream (..., D) with the last mixer's output, in the
        weights' dtype.
        """
        hidden: Tensor = self.norm_f(h, added)[1]
        return hidden
