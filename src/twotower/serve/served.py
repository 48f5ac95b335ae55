"""What the HTTP layer knows of the model behind it."""

from collections.abc import Mapping
from dataclasses import dataclass

from twotower.engine import Mode
from twotower.serve.chat_template import ChatTemplate
from twotower.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as its callers see it."""

    name: str
    created: int  # seconds since 1970
    tokenizer: Tokenizer
    block_size: int  # what it was trained with
    modes: tuple[Mode, ...]
    default_mode: Mode
    defaults: Mapping[str, object]  # decoding options of a request that names none
    template: ChatTemplate | None

    def card(self) -> dict[str, object]:
        """Its entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "twotower",
            "twotower": {
                "modes": list(self.modes),
                "default_mode": self.default_mode,
                "block_size": self.block_size,
                "defaults": dict(self.defaults),
                "has_chat": self.template is not None,
            },
        }
