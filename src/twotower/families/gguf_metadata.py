"""What families share that read GGUF metadata: rounded numbers, special ids, what is refused."""

import reprlib
from collections.abc import Mapping
from typing import Any

_ENDS = ("eos", "eot", "eom")


def short(value: float) -> float:
    """A float32 as the shortest number that means it: 1e-05, not 9.99999974e-06."""
    return float(f"{value:.7g}")


def special_ids(metadata: Mapping[str, Any]) -> dict[str, object]:
    """The ids of a GGUF file's special tokens under their names in config.json."""
    bos, pad, *ends = [
        metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "padding", *_ENDS)
    ]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return {"bos_token_id": bos, "pad_token_id": pad, "eos_token_id": ends}


def require_supported(metadata: Mapping[str, Any], supported: Mapping[str, object]) -> None:
    """ValueError (one line) for a value that changes the model and is not the supported one."""
    for name, allowed in supported.items():
        if metadata.get(name, allowed) != allowed:
            raise ValueError(
                f"{name}={reprlib.repr(metadata[name])} is not supported; only {allowed}"
            )
