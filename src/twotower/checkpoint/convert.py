"""A checkpoint into another layout: two towers, a backbone, or what other libraries load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from twotower.checkpoint.empty import Towers
from twotower.checkpoint.files import INDEX_FILE, WEIGHTS, resolve
from twotower.checkpoint.gguf import Precision, export_gguf
from twotower.checkpoint.gguf_reader import INDEX_FILE as GGUF_INDEX
from twotower.checkpoint.load import load_checkpoint, load_quantised
from twotower.checkpoint.save import (
    backbone_pieces,
    main_dtype,
    save_backbone,
    save_two_towers,
)
from twotower.checkpoint.write import write_checkpoint
from twotower.families import family_of
from twotower.model.precision import Scheme, require_plain
from twotower.model.two_tower import TwoTower
from twotower.paths import usable_path
from twotower.tokenizer import TOKENIZER_FILE, load_tokenizer, read_chat_template

Target = Literal["released", "backbone", "transformers"]


def export_transformers(
    model: TwoTower,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the context tower so that `transformers` 5 loads it as its family's causal LM.

    ValueError (one line) for what it cannot represent. Source: docs/numerics.md.
    """
    require_plain(model, "the transformers layout")
    family = family_of(model.config)
    config = family.transformers_config(model.config) | {
        "architectures": [family.ARCHITECTURE],
        "dtype": main_dtype(model, dtype),
        "model_type": family.MODEL_TYPE,
    }
    write_checkpoint(path, backbone_pieces(model, dtype), config, extra_files)


def convert(
    source: str | Path,
    target: str | Path,
    to: Target,
    dtype: torch.dtype | None = None,
    scheme: Scheme | None = None,
) -> None:
    """Read a checkpoint of any known layout and write another, quantised by a scheme if one is
    given; dtype None keeps its own.

    Files beside the weights (tokenizer, generation defaults, model card) come along.
    """
    folder = _source_folder(source, target)
    towers: Towers = "both" if to == "released" else "context"
    if scheme is None:
        model = load_checkpoint(folder, dtype=dtype, towers=towers)
    else:
        model = load_quantised(folder, scheme, towers)
    write = {
        "released": save_two_towers,
        "backbone": save_backbone,
        "transformers": export_transformers,
    }[to]
    files = _companions(folder) | (_tokenizer_with_bos(folder) if to == "transformers" else {})
    write(model, target, dtype=dtype, extra_files=files)


def convert_to_gguf(
    source: str | Path, target: str | Path, precision: Precision | None = None
) -> None:
    """Read a checkpoint of any known layout and write its context tower to the GGUF file `target`.

    None keeps the precision of the embeddings. Its tokenizer and chat template go in.
    """
    folder = _source_folder(source, target)
    model = load_checkpoint(folder, dtype=None, towers="context")
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    size = model.config.vocab_size
    export_gguf(
        model,
        target,
        dtype=precision or _precision_of(model),
        tokenizer=load_tokenizer(folder).within(size) if has_tokenizer else None,
        chat_template=read_chat_template(folder)[0],
    )


def _source_folder(source: str | Path, target: str | Path) -> Path:
    """The folder to read; ValueError where the target, a folder or a file, is the source itself."""
    folder = resolve(source, field="source")
    if usable_path("target", target).resolve() in (folder.resolve(), Path(source).resolve()):
        raise ValueError(f"{target}: is the source itself; choose another name")
    return folder


def _precision_of(model: TwoTower) -> Precision:
    names: dict[str, Precision] = {"bfloat16": "bfloat16", "float16": "float16"}
    return names.get(main_dtype(model, None), "float32")


def _tokenizer_with_bos(folder: Path) -> dict[str, bytes]:
    """tokenizer.json where it has to be another one than the folder's."""
    try:
        told = load_tokenizer(folder).json_with_bos()
    except ValueError:  # none, or one that is not read here: it comes along as it is
        return {}
    return {} if told is None else {TOKENIZER_FILE: told.encode()}


def _companions(folder: Path) -> dict[str, bytes]:
    """The plain files of a checkpoint that are neither weights nor its configuration."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix.lower() not in (*WEIGHTS, ".py")
        and file.name not in ("config.json", INDEX_FILE, GGUF_INDEX)
    }
