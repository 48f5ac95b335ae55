"""The context tower as a GGUF file: llama.cpp runs it as `nemotron_h` or `nemotron_h_moe`.

Decides names, shapes and precision of the tensors and the metadata beside them; the vocabulary is
`gguf_vocabulary`'s business. The denoiser has no counterpart there. Layout: the `gguf` package.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.gguf_vocabulary import read_vocabulary
from twotower.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig
from twotower.model.precision import require_plain
from twotower.model.two_tower import TwoTower

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Precision = Literal["float32", "bfloat16", "float16", "q8_0"]
_SPELLING = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
# Positions are not encoded, so this limits nothing: it is the cache llama.cpp takes when not told.
_CONTEXT_LENGTH = 16_384
# What stays float32 whatever the file's precision: small, and where rounding costs most.
_ALWAYS_FLOAT32 = (".A_log", ".D", ".dt_bias", ".conv1d.weight", ".mixer.norm.weight")


class Part(NamedTuple):
    """One tensor of the file: its name there, its values, and the element type it gets."""

    name: str
    values: Tensor
    kind: "GGMLQuantizationType"


def export_gguf(
    model: TwoTower,
    path: str | Path,
    *,
    dtype: Precision = "float32",
    tokenizer: bytes | None = None,
) -> None:
    """Write the context tower to the file `path`; an existing one is replaced when it is complete.

    tokenizer: content of tokenizer.json; without one the tokens get numbers for names. q8_0 holds
    rows of a multiple of 32 numbers, other matrices become float16. ValueError (one line) for what
    llama.cpp cannot represent, a missing `gguf`, or a full disk.
    """
    require_plain(model, "GGUF")
    _check(model.config, dtype)
    _import_gguf()
    file = Path(path).resolve()
    if file.is_dir():
        raise ValueError(f"{path}: is a folder; name the file to write, such as model.gguf")
    aside = file.parent / f".{file.name}.new"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(model, aside, dtype, tokenizer, name=file.stem)
        aside.replace(file)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from None
    finally:
        if aside.exists():
            aside.unlink()


def _import_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            "writing GGUF needs the package gguf; install it with: pip install 'twotower[bench]'"
        ) from None


def _check(config: ModelConfig, dtype: str) -> None:
    """ValueError for a model that llama.cpp's graph of this architecture cannot compute."""
    if dtype not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ValueError(f"dtype={dtype!r} is no precision of a GGUF file; use one of {known}")
    pattern = config.hybrid_override_pattern
    if (MLP in pattern and MOE in pattern) or MAMBA not in pattern or ATTENTION not in pattern:
        raise ValueError(
            f"hybrid_override_pattern={pattern} cannot be exported: llama.cpp wants {MAMBA} and "
            f"{ATTENTION} layers, and {MLP} or {MOE} but not both"
        )
    for name, allowed in (("use_bias", False), ("n_group", 1)):
        relevant = name != "n_group" or MOE in pattern
        if relevant and getattr(config, name) != allowed:
            raise ValueError(
                f"{name}={getattr(config, name)} cannot be exported: llama.cpp computes this "
                f"architecture with {name}={allowed} only"
            )


def _write(
    model: TwoTower, file: Path, dtype: Precision, tokenizer: bytes | None, name: str
) -> None:
    """Header, metadata, then one tensor in memory at a time."""
    from gguf import GGUFWriter, quants

    writer = GGUFWriter(file, _architecture(model.config))
    writer.add_name(name)
    _add_sizes(writer, model.config)
    _add_file_type(writer, dtype)
    read_vocabulary(model.config, tokenizer).add_to(writer)
    parts = list(_parts(model, dtype))
    for part in parts:
        writer.add_tensor_info(
            part.name, part.values.shape, np.dtype(np.float32), _num_bytes(part), part.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            values = part.values.detach().to("cpu", torch.float32).contiguous().numpy()
            writer.write_tensor_data(quants.quantize(values, part.kind))
        for stream in writer.fout or ():
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        writer.close()


def _num_bytes(part: Part) -> int:
    from gguf import GGML_QUANT_SIZES

    block_size, block_bytes = GGML_QUANT_SIZES[part.kind]
    return part.values.numel() // block_size * block_bytes


def _parts(model: TwoTower, dtype: Precision) -> Iterator[Part]:
    """Every tensor of the context tower as llama.cpp wants it, large matrices unconverted."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    ids = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(ids[_architecture(model.config)], model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.startswith(names.CONTEXT_PARTS):
            found = table.get_name(_known_name(name), try_suffixes=(".weight", ".bias"))
            assert found is not None, f"{name} has no place in a GGUF file"
            yield Part(found, _shaped(name, tensor, model.config), _kind(name, tensor, dtype))
    if MAMBA in model.config.hybrid_override_pattern and not model.config.use_conv_bias:
        yield from _no_conv_biases(model.config)


def _known_name(name: str) -> str:
    """Our parameter's name in the spelling that the `gguf` package looks up."""
    if names.is_stacked(name):
        layer, projection = name.split(".")[2], name.rsplit(".", 1)[1]
        return f"model.layers.{layer}.mlp.experts.{projection}.weight"
    known = names.backbone_name(name).replace("dt_bias", "dt.bias")
    return known.replace("e_score_correction_bias", "e_score_correction.bias")


def _shaped(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Values and shape that llama.cpp expects where they are not the model's own."""
    if name.endswith(".A_log"):
        return -tensor.float().exp().unsqueeze(1)  # (H, 1): the decay rates themselves
    if name.endswith(".D"):
        return tensor.unsqueeze(1)  # (H, 1)
    if name.endswith(".conv1d.weight"):
        return tensor.squeeze(1)  # (C, W)
    if name.endswith(".mixer.norm.weight"):
        return tensor.reshape(config.n_groups, -1)  # (G, H * P / G)
    return tensor


def _kind(name: str, tensor: Tensor, dtype: Precision) -> "GGMLQuantizationType":
    """A tensor's element type: vectors, routers and the scan's constants stay float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.dim() < 2 or name.endswith(_ALWAYS_FLOAT32) or names.is_router(name):
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[_SPELLING[dtype]]
    fits = tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else GGMLQuantizationType.F16


def _no_conv_biases(config: ModelConfig) -> Iterator[Part]:
    """Zeros for convolutions without a bias: llama.cpp insists on one."""
    from gguf import GGMLQuantizationType

    for index, kind in enumerate(config.hybrid_override_pattern):
        if kind == MAMBA:
            zeros = torch.zeros(config.conv_channels)
            yield Part(f"blk.{index}.ssm_conv1d.bias", zeros, GGMLQuantizationType.F32)


def _architecture(config: ModelConfig) -> str:
    return "nemotron_h_moe" if MOE in config.hybrid_override_pattern else "nemotron_h"


def _add_file_type(writer: "GGUFWriter", dtype: Precision) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    spelling = _SPELLING[dtype]
    writer.add_file_type(LlamaFileType["ALL_F32" if spelling == "F32" else f"MOSTLY_{spelling}"])
    if dtype == "q8_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_sizes(writer: "GGUFWriter", config: ModelConfig) -> None:
    """The sizes; a layer's kind is told by its feed-forward width and number of KV heads alone."""
    pattern = config.hybrid_override_pattern
    widths = {MLP: config.intermediate_size, MOE: config.moe_intermediate_size}
    kv_heads = {ATTENTION: config.num_key_value_heads}
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_CONTEXT_LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length([widths.get(kind, 0) for kind in pattern])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([kv_heads.get(kind, 0) for kind in pattern])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)  # each is read by some versions
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.mamba_width)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_ssm_group_count(config.n_groups)
    if MOE in pattern:
        _add_expert_sizes(writer, config)


def _add_expert_sizes(writer: "GGUFWriter", config: ModelConfig) -> None:
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
