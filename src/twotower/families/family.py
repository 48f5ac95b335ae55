"""What the rest of the library asks of a family: a module with these names is one."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from twotower.config import TwoTowerConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter


class Family(Protocol):
    """A model architecture as files spell it; its arithmetic is the layers' business.

    Names "inside a tower" are ours: embeddings.weight, layers.{i}.norm.weight,
    layers.{i}.mixer.*, norm_f.weight, lm_head.weight.
    """

    @property
    def MODEL_TYPE(self) -> str:
        """`model_type` in config.json."""

    @property
    def ARCHITECTURE(self) -> str:
        """The class of `transformers` that loads a single tower."""

    @property
    def TWO_TOWER_ARCHITECTURE(self) -> str:
        """What config.json of two towers says under `architectures`."""

    @property
    def LAYOUTS(self) -> Mapping[str, str]:
        """How tensor names of a single tower begin, and what that layout is called."""

    @property
    def TIES_HEAD(self) -> bool:
        """Whether `transformers` and llama.cpp make a tied head of the embeddings, so that files
        leave it out."""

    @property
    def GGUF_READS(self) -> tuple[str, ...]:
        """llama.cpp's architectures whose files `config_from_gguf` reads."""

    @property
    def GGUF_FLOAT32(self) -> tuple[str, ...]:
        """Endings of the names of tensors that stay float32 in every GGUF file."""

    def read_config(self, given: Mapping[str, object], /) -> TwoTowerConfig:
        """What config.json says; ValueError (one line) for what is not supported."""
        ...

    def write_config(self, config: TwoTowerConfig, /) -> dict[str, object]:
        """config.json, as `read_config` reads it."""
        ...

    def transformers_config(self, config: TwoTowerConfig, /) -> dict[str, object]:
        """config.json of the context tower as `transformers` 5 reads it."""
        ...

    def to_tower_name(self, name: str, /) -> str | None:
        """A tensor of a single-tower file by its name inside a tower; None: not needed."""
        ...

    def from_tower_name(self, name: str, /) -> str:
        """The inverse, in the layout that is written."""
        ...

    def gguf_architecture(self, config: TwoTowerConfig, /) -> str:
        """llama.cpp's name for it; ValueError for a model that it cannot compute."""
        ...

    def gguf_lookup_name(self, name: str, /) -> str:
        """A name inside a tower as the table of the `gguf` package knows it."""
        ...

    def gguf_shape(
        self, name: str, shape: tuple[int, ...], config: TwoTowerConfig, /
    ) -> tuple[int, ...]:
        """A tensor's shape in a GGUF file."""
        ...

    def gguf_values(self, name: str, values: Tensor, config: TwoTowerConfig, /) -> Tensor:
        """A tensor's values as llama.cpp expects them, in the model's shape."""
        ...

    def gguf_extra_tensors(self, config: TwoTowerConfig, /) -> Iterator[tuple[str, Tensor]]:
        """Tensors that llama.cpp wants and the model does not have."""
        ...

    def values_from_gguf(self, name: str, values: Tensor, config: TwoTowerConfig, /) -> Tensor:
        """The inverse of `gguf_values`."""
        ...

    def config_from_gguf(
        self,
        metadata: Mapping[str, Any],
        tensors: frozenset[str],
        rope_factors: list[float] | None,
        /,
    ) -> dict[str, object]:
        """config.json of a GGUF file: its metadata, the architecture's own without that prefix, its
        tensors' names, the factors of its scaling.

        KeyError for metadata that is missing, ValueError (one line) for what is not supported.
        """
        ...

    def add_gguf_sizes(self, writer: "GGUFWriter", config: TwoTowerConfig, /) -> None:
        """The metadata that describes the architecture."""
        ...
