"""Each field of `transformers`' generation_config.json is honoured, named, or changes no text."""

import json
import shutil
from pathlib import Path

import pytest

from twotower import load_model
from twotower.checkpoint import generation, resolve
from twotower.engine.resolved import DEFAULTS

transformers = pytest.importorskip("transformers")

# How a text is computed, what is returned beside it, beams (num_beams is named), encoders; lengths
# of a whole text; ids that others stand for; methods that `transformers` 5 no longer has.
NO_TEXT = {
    "max_length", "early_stopping", "use_mtp", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "length_penalty", "renormalize_logits", "remove_invalid_values",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "penalty_alpha", "dola_layers",
    "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids",
    "prefill_chunk_size", "transformers_version",
}  # fmt: skip


def test_no_field_is_forgotten() -> None:
    """Silent failure: a version adds a field, and texts differ without a word."""
    fields = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    named = {*generation._UNHEEDED, *generation._UNHEEDED_SAMPLING}
    assert fields - NO_TEXT - named - {"do_sample"} - set(DEFAULTS) == set()
    assert not named & set(DEFAULTS)


def test_what_is_passed_over_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Silent failure: a fine-tune that suppresses tokens writes them here."""
    shutil.copytree(resolve("shipped"), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "typical_p": 0.9}
    file.write_text(json.dumps(neutral))
    load_model(tmp_path / "model", backend="eager")
    assert not caplog.messages
    file.write_text(json.dumps(neutral | {"suppress_tokens": [5], "do_sample": True}))
    load_model(tmp_path / "model", backend="eager")
    (line,) = caplog.messages
    assert "suppress_tokens=[5], typical_p=0.9: not supported and passed over" in line
