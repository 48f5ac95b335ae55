"""Options of tests: defaults that only count in the modes that use them."""

from twotower import GenerateOptions
from twotower.engine import MODES
from twotower.engine.resolved import FIELD_MODES, SAMPLED_ONLY


def options_of(defaults: dict[str, object], changes: dict[str, object]) -> GenerateOptions:
    """The changes, and those of the defaults that the mode uses. At temperature 0 without those
    of sampling, so that one set of options serves greedy and sampled rows.
    """
    mode = changes.get("mode", "diffusion")
    used = {n: value for n, value in defaults.items() if mode in FIELD_MODES.get(n, MODES)}
    values = {"mode": mode} | used | changes
    if not values.get("temperature"):
        for name in SAMPLED_ONLY:
            values.pop(name, None)
    return GenerateOptions(**values)  # type: ignore[arg-type]
