"""The context tower as a GGUF file for llama.cpp.

Decides the precision of the tensors and how the file is written; names, shapes and sizes are the
family's business, the vocabulary is `gguf_vocabulary`'s. The denoiser has no counterpart there.
Layout: the `gguf` package.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoint import names
from twotower.checkpoint.gguf_reader import gguf_names
from twotower.checkpoint.gguf_vocabulary import Vocabulary, read_vocabulary
from twotower.families import family_of
from twotower.model.precision import require_plain
from twotower.model.two_tower import TwoTower
from twotower.paths import usable_path
from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

Precision = Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"]
_SPELLING = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0",
}  # fmt: skip


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
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
) -> None:
    """Write the context tower to the file `path`; an existing one is replaced when it is complete.

    Without a tokenizer the tokens get numbers for names. q8_0 and q4_0 hold rows of a multiple of
    32 numbers, other matrices become float16; embeddings and head have 8 bits in both. ValueError
    (one line) for what llama.cpp cannot represent, a missing `gguf`, or a full disk.
    """
    require_plain(model, "GGUF")
    model.require_read("GGUF")
    if dtype not in _SPELLING:
        known = ", ".join(_SPELLING)
        raise ValueError(f"dtype={dtype!r} is not a precision of a GGUF file; use one of {known}")
    family_of(model.config).gguf_architecture(model.config)  # ValueError where it has none
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            "writing GGUF needs the package gguf; install it with: pip install '.[bench]'"
        ) from None
    file = usable_path("path", path).resolve()
    if file.is_dir():
        raise ValueError(f"{path}: is a folder; name the file to write, such as model.gguf")
    aside = usable_path("path", file.parent / f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        vocabulary = read_vocabulary(model.config, tokenizer, chat_template)
        _write(model, aside, dtype, vocabulary, name=file.stem)
        aside.replace(file)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from None
    finally:
        if aside.exists():
            aside.unlink()


def _write(
    model: TwoTower, file: Path, dtype: Precision, vocabulary: Vocabulary, name: str
) -> None:
    """Header, metadata, then one tensor in memory at a time."""
    from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, quants

    family = family_of(model.config)
    writer = GGUFWriter(file, family.gguf_architecture(model.config))
    writer.add_name(name)
    writer.add_vocab_size(model.config.vocab_size)
    family.add_gguf_sizes(writer, model.config)
    kind = _SPELLING[dtype]
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    if dtype in ("q8_0", "q4_0"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    vocabulary.add_to(writer)
    parts = list(_parts(model, dtype))
    for part in parts:
        block_size, block_bytes = GGML_QUANT_SIZES[part.kind]
        size = part.values.numel() // block_size * block_bytes
        writer.add_tensor_info(part.name, part.values.shape, np.dtype(np.float32), size, part.kind)
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


def _parts(model: TwoTower, dtype: Precision) -> Iterator[Part]:
    """Every tensor of the context tower as llama.cpp wants it, large matrices unconverted."""
    from gguf import GGMLQuantizationType

    config, family = model.config, family_of(model.config)
    find = gguf_names(config)
    for name, tensor in model.state_dict().items():
        if names.is_in_backbone(name, family, config.tie_word_embeddings):
            inner = names.inner_name(name)
            found = find(inner)
            assert found is not None, f"{name} has no place in a GGUF file"
            shape = family.gguf_shape(inner, tuple(tensor.shape), config)
            values = family.gguf_values(inner, tensor, config).reshape(shape)
            yield Part(found, values, _kind(name, tensor, dtype, family.GGUF_FLOAT32))
    for name, values in family.gguf_extra_tensors(config):
        yield Part(name, values, GGMLQuantizationType.F32)


def _kind(
    name: str, tensor: Tensor, dtype: Precision, always_float32: tuple[str, ...]
) -> "GGMLQuantizationType":
    """A tensor's element type: vectors, routers and what the family names stay float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.dim() < 2 or name.endswith(always_float32) or names.is_router(name):
        return GGMLQuantizationType.F32
    is_large = dtype == "q4_0" and name.endswith(("embeddings.weight", "lm_head.weight"))
    wanted = GGMLQuantizationType["Q8_0" if is_large else _SPELLING[dtype]]
    fits = tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else GGMLQuantizationType.F16
