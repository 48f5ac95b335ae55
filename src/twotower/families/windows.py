"""How config.json spells sliding windows of attention. Source: transformers 5, configurations."""

import reprlib
from collections.abc import Callable, Sequence

from twotower.config import TowerConfig
from twotower.families.fields import Values, refuse, typed
from twotower.specs import AttentionSpec

Slides = Callable[[Values, int, bool], bool]
"""Whether a block attends in a window, of a file that does not say so for each: by the file's
values, the block's number, and whether it has positions."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_SWITCH = "use_sliding_window"


def read_windows(
    values: Values, has_rope: Sequence[bool], slides: Slides | None, has_switch: bool
) -> list[int | None]:
    """The window of each block's attention, None where it sees all; ValueError (one line) for what
    contradicts.

    slides: None for a family without windows. has_switch: whether it heeds use_sliding_window.
    """
    is_on = not has_switch or bool(values.get(_SWITCH))
    if slides is None and is_on:
        refuse(values, {"sliding_window": None})
    found = values.get("sliding_window") if is_on else None
    window = None if found is None else typed("sliding_window", found, int)
    if window is not None and not (isinstance(window, int) and window > 0):
        raise ValueError(f"config.json: sliding_window={window} must be at least 1")
    usual = [
        _SLIDING if window is not None and slides is not None and slides(values, i, rope) else _FULL
        for i, rope in enumerate(has_rope)
    ]
    types = values.get("layer_types", usual)
    if not isinstance(types, list) or len(types) != len(usual):
        raise ValueError(
            f"config.json: layer_types={reprlib.repr(types)} contradicts "
            f"num_hidden_layers={len(usual)}; it must name the kind of each layer"
        )
    for one in types:
        if one not in (_FULL, _SLIDING):
            raise ValueError(
                f"config.json: layer_types has {reprlib.repr(one)}, which is not supported; "
                f"only {_FULL!r} and {_SLIDING!r}"
            )
    if types != usual and (window is None or not has_switch):
        # transformers finds no window then, or passes the list over.
        other = next(a for a, b in zip(types, usual, strict=True) if a != b)
        raise ValueError(
            f"config.json: layer_types has {other!r}, which contradicts sliding_window={window}; "
            "keep the one that is right"
        )
    return [window if one == _SLIDING else None for one in types]


def write_windows(tower: TowerConfig, has_switch: bool) -> dict[str, object]:
    """The inverse."""
    windows = [one.window for one in tower.layers_of(AttentionSpec)]
    if not any(windows):
        return {"sliding_window": None}
    found: dict[str, object] = {"sliding_window": next(filter(None, windows))}
    if has_switch:
        found |= {_SWITCH: True, "layer_types": [_SLIDING if w else _FULL for w in windows]}
    return found
