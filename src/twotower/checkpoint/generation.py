"""generation_config.json as `transformers` writes it: what of it no option of ours stands for."""

import logging
import reprlib
from collections.abc import Mapping
from pathlib import Path

_log = logging.getLogger(__name__)
# Fields that change what transformers 5 writes, by the value that changes nothing; null never does.
_UNHEEDED: Mapping[str, object] = {
    "min_length": 0, "min_new_tokens": 0, "max_time": None, "stop_strings": [], "num_beams": 1,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": {},
    "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "guidance_scale": 1.0, "token_healing": False,
    "watermarking_config": None,
}  # fmt: skip
_UNHEEDED_SAMPLING: Mapping[str, object] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
}  # fmt: skip


def log_unheeded(file: Path, defaults: Mapping[str, object]) -> None:
    """One warning that names the defaults of a file that are passed over and would change texts."""
    known = {**_UNHEEDED, **(_UNHEEDED_SAMPLING if defaults.get("do_sample") is True else {})}
    found = [
        f"{name}={reprlib.repr(defaults[name])}"
        for name, off in known.items()
        if defaults.get(name) not in (None, off)
    ]
    if found:
        _log.warning(
            "%s: %s: not supported and passed over; transformers would write other texts",
            file,
            ", ".join(found),
        )
