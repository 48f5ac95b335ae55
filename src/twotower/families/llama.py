"""Llama and its relatives: Mistral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3.

A block is an attention layer with rotary positions and a gated MLP, or experts; the families differ
in that, in biases, norms of queries and keys, windows, and layers without positions. Source:
transformers 5, each family's configuration and modelling file; llama.cpp's convert_hf_to_gguf.py.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from twotower.config import InitSpec, TowerConfig, TwoTowerConfig
from twotower.families.feed_forward import (
    EXPERT_DEFAULTS,
    add_gguf_feed_forward,
    feed_forward_from_gguf,
    read_feed_forward,
    refuse_gguf_feed_forward,
    write_feed_forward,
)
from twotower.families.fields import (
    Values,
    read_spec,
    read_two_towers,
    refuse,
    refuse_per_layer,
    require,
    typed,
    with_synonyms,
    write_spec,
    write_two_towers,
)
from twotower.families.gguf_metadata import require_supported, short, special_ids
from twotower.families.rope import (
    add_gguf_rope,
    read_rope,
    read_rotary_blocks,
    refuse_gguf_rope,
    rope_from_gguf,
    write_rope,
)
from twotower.families.windows import Slides, read_windows, write_windows
from twotower.layers.rope import inverse_frequencies
from twotower.specs import AttentionSpec, LayerSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter

_TOWER = {"hidden_size": "hidden_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps"}
_ATTENTION = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "bias": "attention_bias",
    "out_bias": "attention_bias",
}
_REQUIRED = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
]  # fmt: skip
_SYNONYMS = {"num_local_experts": "num_experts"}  # transformers 5 writes the first
_TOP = {"embed_tokens.": "embeddings.", "norm.": "norm_f."}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_MIXERS = ("self_attn", "mlp")  # of a block, in order
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers", "eos_token_id", "reads")
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_SMOLLM3_INTERVAL = 4  # llama.cpp knows no other
_MAX_BLOCKS = 512
_GGUF_SUPPORTED = {  # what llama.cpp computes with where the file says so
    "attention.sliding_window": 0, "attention.causal": True, "rope.scaling.attn_factor": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LlamaFamily:
    """One of the families, by what sets it apart. See `Family` for what the names mean."""

    MODEL_TYPE: str
    ARCHITECTURE: str
    gguf_name: str
    """llama.cpp's architecture."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What config.json means where it is silent, as in `transformers`."""
    token_ids: Mapping[str, int] = field(default_factory=dict)
    """Special ids of a file that does not name them."""
    has_qkv_bias: bool | None = None
    """None: as the file says."""
    has_qk_norm: bool = False
    has_no_rope_layers: bool = False
    has_experts: bool = False
    slides: Slides | None = None
    """Which blocks' attention has a window; None: none in this family."""
    pairs_neighbours: bool = False
    """llama.cpp turns pairs of neighbours: rows of queries and keys change places."""
    gguf_has_usual_heads: bool = False
    """llama.cpp has no head_dim but hidden_size / num_attention_heads."""
    is_read_from_gguf: bool = True
    """False: files under its name there are read as another family."""

    TWO_TOWER_ARCHITECTURE: ClassVar[str] = "TwoTowerForCausalLM"
    LAYOUTS: ClassVar[Mapping[str, str]] = {"model.": "transformers"}
    TIES_HEAD: ClassVar[bool] = True

    @property
    def GGUF_READS(self) -> tuple[str, ...]:
        """Its name there, where files of that name are read as this family."""
        return (self.gguf_name,) if self.is_read_from_gguf else ()

    GGUF_FLOAT32: ClassVar[tuple[str, ...]] = ()

    def read_config(self, given: Values) -> TwoTowerConfig:
        """What config.json says; ValueError (one line) for what is not supported."""
        # A null counts as said: transformers keeps it, too.
        silent = {n: v for n, v in self.defaults.items() if n not in given}
        values = {**silent, **with_synonyms(given, _SYNONYMS if self.has_experts else {})}
        unused = "intermediate_size" if self.has_experts else ""  # where all blocks have them
        require(values, [name for name in _REQUIRED if name != unused])
        blocks = _num_blocks(values["num_hidden_layers"])
        self._refuse(given, values, blocks)
        attention = self._read_attention(values)
        feed_forward = read_feed_forward(values, blocks, self.has_experts)
        layers: list[LayerSpec] = []
        has_rope = [True] * blocks
        if self.has_no_rope_layers:
            has_rope = read_rotary_blocks(values, blocks)
        windows = read_windows(values, has_rope, self.slides, self._has_switch)
        for is_turned, window, after in zip(has_rope, windows, feed_forward, strict=True):
            own = replace(attention, rope=attention.rope if is_turned else None, window=window)
            layers += [own, after]
        tower = read_spec(TowerConfig, values, _TOWER, layers=tuple(layers))
        init = read_spec(InitSpec, values, {"std": "initializer_range"}, rescale_residual=False)
        # No token of such a vocabulary is a mask: its id is one past the last.
        said = {"mask_token_id": tower.vocab_size, **values}
        ids = {name: given.get(name, self.token_ids.get(name)) for name in _TOKEN_IDS}
        return read_two_towers(self.MODEL_TYPE, tower, {**said, **ids}, init=init)

    def write_config(self, config: TwoTowerConfig) -> dict[str, object]:
        """config.json, as `read_config` and `transformers` read it."""
        tower = config.context
        # A bias that the family always has is no field of its file.
        names = {n: f for n, f in _ATTENTION.items() if n != "bias"}
        fields = {
            **write_spec(tower, _TOWER),
            **write_spec(_attention(config), names),
            **write_feed_forward(tower, self.has_experts),
            **write_two_towers(config),
            "num_hidden_layers": tower.num_layers // 2,
            "hidden_act": "silu",
            "initializer_range": config.init.std,
            "rope_parameters": write_rope(tower),
            **write_windows(tower, self._has_switch),
        }
        if self.has_no_rope_layers:
            rotary = tower.layers_of(AttentionSpec)
            fields["no_rope_layers"] = [int(one.rope is not None) for one in rotary]
        return fields

    def transformers_config(self, config: TwoTowerConfig) -> dict[str, object]:
        """config.json of the context tower as `transformers` 5 reads it."""
        own = ("mask_token_id", "block_size", "bidirectional_mamba", "reads")
        return {n: value for n, value in self.write_config(config).items() if n not in own}

    def to_tower_name(self, name: str) -> str | None:
        """A tensor of a single-tower file by its name inside a tower; None: not needed."""
        if name.endswith("rotary_emb.inv_freq"):
            return None
        inner = name.removeprefix("model.")
        for theirs, ours in _TOP.items():
            if inner.startswith(theirs):
                return ours + inner.removeprefix(theirs)
        match = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(.+)", inner)
        for kind, parts in (("mixer", _MIXERS), ("norm", _NORMS)):
            if match is not None and match[2] in parts:
                return f"layers.{2 * int(match[1]) + parts.index(match[2])}.{kind}.{match[3]}"
        return name

    def from_tower_name(self, name: str) -> str:
        """The inverse."""
        for theirs, ours in _TOP.items():
            if name.startswith(ours):
                return f"model.{theirs}{name.removeprefix(ours)}"
        match = re.fullmatch(r"layers\.(\d+)\.(norm|mixer)\.(.+)", name)
        if match is None:
            return name  # the head
        block, side = divmod(int(match[1]), 2)
        parts = _NORMS if match[2] == "norm" else _MIXERS
        return f"model.layers.{block}.{parts[side]}.{match[3]}"

    def gguf_architecture(self, config: TwoTowerConfig) -> str:
        """llama.cpp's name for it; ValueError for a model that it cannot compute."""
        attention, rope = _attention(config), config.context.rotary
        rotary = [one.rope is not None for one in config.context.layers_of(AttentionSpec)]
        known = [(i + 1) % _SMOLLM3_INTERVAL != 0 for i in range(len(rotary))]
        usual = config.hidden_size / attention.num_heads
        windows = [one.window for one in config.context.layers_of(AttentionSpec)]
        for is_refused, reason in (
            (
                any(windows),
                "sliding_window cannot be exported: llama.cpp attends to all tokens in this family",
            ),
            (
                self.has_no_rope_layers and rotary != known,
                "no_rope_layers cannot be exported: llama.cpp leaves positions out of every "
                f"{_SMOLLM3_INTERVAL}th layer only",
            ),
            (
                self.has_qk_norm and attention.bias,
                "attention_bias=true cannot be exported: llama.cpp has no such bias in this family",
            ),
            (
                self.gguf_has_usual_heads and attention.head_dim != usual,
                f"head_dim={attention.head_dim} cannot be exported: llama.cpp knows only "
                f"hidden_size / num_attention_heads, {usual:g}, in this family",
            ),
        ):
            if is_refused:
                raise ValueError(reason)
        refuse_gguf_feed_forward(config.context, self.has_experts)
        if rope is not None:
            refuse_gguf_rope(rope[0], has_factors=self.gguf_name == "llama")
        return self.gguf_name

    def gguf_lookup_name(self, name: str) -> str:
        """A name inside a tower as the table of the `gguf` package knows it."""
        known = self.from_tower_name(name)
        return f"{known}.weight" if re.search(r"\.experts\.\w+$", known) else known

    def gguf_shape(
        self, name: str, shape: tuple[int, ...], config: TwoTowerConfig
    ) -> tuple[int, ...]:
        """A tensor's shape in a GGUF file: the model's."""
        return shape

    def gguf_values(self, name: str, values: Tensor, config: TwoTowerConfig) -> Tensor:
        """A tensor's values as llama.cpp expects them: rows of queries and keys in its order."""
        if not self.pairs_neighbours or not re.search(r"\.[qk]_proj\.", name):
            return values
        half = _attention(config).head_dim // 2
        pairs: Tensor = values.unflatten(0, (-1, 2, half))
        return pairs.transpose(1, 2).flatten(0, 2)

    def values_from_gguf(self, name: str, values: Tensor, config: TwoTowerConfig) -> Tensor:
        """The inverse of `gguf_values`."""
        if not self.pairs_neighbours or not re.search(r"\.[qk]_proj\.", name):
            return values
        half = _attention(config).head_dim // 2
        pairs: Tensor = values.unflatten(0, (-1, half, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    def config_from_gguf(
        self,
        metadata: Mapping[str, Any],
        tensors: frozenset[str],
        rope_factors: list[float] | None,
    ) -> dict[str, object]:
        """config.json of a GGUF file. See `Family`."""
        require_supported(metadata, _GGUF_SUPPORTED)
        heads, width = metadata["attention.head_count"], metadata["embedding_length"]
        head_dim = metadata.get("attention.key_length", width // max(heads, 1))
        values: dict[str, object] = {
            "hidden_size": width,
            "num_hidden_layers": metadata["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
            "rms_norm_eps": short(metadata["attention.layer_norm_rms_epsilon"]),
            "rope_parameters": rope_from_gguf(metadata, head_dim, rope_factors),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_output.bias" in tensors,
            "sliding_window": None,
            **feed_forward_from_gguf(metadata, tensors, self.has_experts),
        }
        return values | special_ids(metadata)

    def gguf_extra_tensors(self, config: TwoTowerConfig) -> Iterator[tuple[str, Tensor]]:
        """The factors of Llama 3's scaling, which llama.cpp keeps as a tensor."""
        if config.context.rotary is None or config.context.rotary[0].scaling != "llama3":
            return
        spec, head_dim = config.context.rotary
        plain = inverse_frequencies(replace(spec, scaling="none"), head_dim)
        yield "rope_freqs.weight", plain / inverse_frequencies(spec, head_dim)

    def add_gguf_sizes(self, writer: "GGUFWriter", config: TwoTowerConfig) -> None:
        """The metadata that describes the architecture."""
        attention = _attention(config)
        writer.add_context_length(32_768)  # limits nothing: the cache it takes when not told
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.context.num_layers // 2)
        add_gguf_feed_forward(writer, config.context)
        writer.add_head_count(attention.num_heads)
        writer.add_head_count_kv(attention.num_kv_heads)
        writer.add_key_length(attention.head_dim)
        writer.add_value_length(attention.head_dim)
        writer.add_layer_norm_rms_eps(config.context.norm_eps)
        if config.context.rotary is not None:
            rope, head_dim = config.context.rotary
            writer.add_rope_dimension_count(head_dim)
            add_gguf_rope(writer, rope)

    @property
    def _has_switch(self) -> bool:
        """Whether it heeds use_sliding_window, and layer_types beside it."""
        return "use_sliding_window" in self.defaults

    def _read_attention(self, values: Values) -> AttentionSpec:
        """What all blocks' attention has in common, with its positions."""
        found = dict(values)
        heads = typed("num_attention_heads", found["num_attention_heads"], int)
        width = typed("hidden_size", found["hidden_size"], int)
        found.setdefault("num_key_value_heads", heads)
        if "head_dim" not in found:
            assert isinstance(heads, int) and isinstance(width, int)
            found["head_dim"] = width // max(heads, 1)
        if self.has_qkv_bias is not None:
            found["attention_bias"] = False
        spec = read_spec(
            AttentionSpec, found, _ATTENTION, rope=read_rope(values), qk_norm=self.has_qk_norm
        )
        return replace(spec, bias=spec.bias or bool(self.has_qkv_bias))

    def _refuse(self, given: Values, values: Values, num_blocks: int) -> None:
        """ValueError for what would change the model and is not supported."""
        refuse(values, {"hidden_act": "silu", "partial_rotary_factor": 1.0, "is_causal": True})
        refuse_per_layer(given, num_blocks, _PER_LAYER)


def _slides_from(values: Values, block: int, has_rope: bool) -> bool:
    """Qwen's windows begin at a block."""
    first = typed("max_window_layers", values.get("max_window_layers"), int)
    assert isinstance(first, int)
    return block >= first


LLAMA = LlamaFamily(
    MODEL_TYPE="llama", ARCHITECTURE="LlamaForCausalLM", gguf_name="llama",
    defaults={"rms_norm_eps": 1e-6}, token_ids=_LLAMA_IDS, pairs_neighbours=True,
)  # fmt: skip
MISTRAL = LlamaFamily(
    MODEL_TYPE="mistral", ARCHITECTURE="MistralForCausalLM", gguf_name="llama",
    defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    token_ids=_LLAMA_IDS, has_qkv_bias=False, pairs_neighbours=True,
    slides=lambda values, block, has_rope: True, is_read_from_gguf=False,
)  # fmt: skip
QWEN2 = LlamaFamily(
    MODEL_TYPE="qwen2", ARCHITECTURE="Qwen2ForCausalLM", gguf_name="qwen2",
    defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 32, **_QWEN_WINDOWS},
    has_qkv_bias=True, gguf_has_usual_heads=True, slides=_slides_from,
)  # fmt: skip
QWEN3 = LlamaFamily(
    MODEL_TYPE="qwen3", ARCHITECTURE="Qwen3ForCausalLM", gguf_name="qwen3",
    defaults={
        "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOWS,
    },
    has_qk_norm=True, slides=_slides_from,
)  # fmt: skip
QWEN3_MOE = LlamaFamily(
    MODEL_TYPE="qwen3_moe", ARCHITECTURE="Qwen3MoeForCausalLM", gguf_name="qwen3moe",
    defaults={
        "rms_norm_eps": 1e-6, "num_key_value_heads": 4, **_QWEN_WINDOWS, **EXPERT_DEFAULTS,
    },
    has_qk_norm=True, has_experts=True,
)  # fmt: skip
SMOLLM3 = LlamaFamily(
    MODEL_TYPE="smollm3", ARCHITECTURE="SmolLM3ForCausalLM", gguf_name="smollm3",
    defaults={
        "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "rope_theta": 2e6,
        "no_rope_layer_interval": 4, "tie_word_embeddings": True, "use_sliding_window": False,
    },
    token_ids={"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
    has_no_rope_layers=True, pairs_neighbours=True,
    slides=lambda values, block, has_rope: not has_rope,
)  # fmt: skip
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, SMOLLM3)


def _num_blocks(value: object) -> int:
    """num_hidden_layers, within bounds before a list is made of it."""
    count = typed("num_hidden_layers", value, int)
    if not isinstance(count, int) or not 1 <= count <= _MAX_BLOCKS:
        raise ValueError(
            f"config.json: num_hidden_layers={reprlib.repr(count)} must be between 1 and "
            f"{_MAX_BLOCKS}"
        )
    return count


def _attention(config: TwoTowerConfig) -> AttentionSpec:
    """The first block's: all are alike, but for positions and windows."""
    return config.context.layers_of(AttentionSpec)[0]
