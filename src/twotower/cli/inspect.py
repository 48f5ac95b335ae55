"""`twotower inspect`: what a checkpoint is, from its configuration and file headers alone."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from twotower.checkpoint.denoiser import (
    DenoiserRecord,
    describe_denoiser,
    find_denoiser,
    is_denoiser,
)
from twotower.checkpoint.inspect import KINDS, Description, FilesRecord, PrecisionRecord, describe
from twotower.cli.tables import make_console, print_table
from twotower.families import config_to_dict
from twotower.lab.report import Table
from twotower.model.ngrams import NGRAM_BYTES
from twotower.paths import usable_path
from twotower.specs import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print architecture, parameters by kind and memory by dtype, without reading the weights."""

    path: Annotated[str | None, tyro.conf.Positional] = None
    """shipped, nano-30b (the released model), a checkpoint folder, GGUF file, hub id owner/name, a
    config.json, or a denoiser's folder."""
    model: str | None = None
    """The same as PATH."""
    denoiser: str | None = None
    """Folder or hub id of a denoiser that `twotower adapt` trained for this model: both
    together."""
    json: bool = False
    """One JSON object on stdout instead of tables."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.model is None):
            raise ValueError("inspect needs one model: a PATH, or --model")


def run(options: InspectOptions) -> int:
    """Print the description; returns the exit status. Errors of the user arrive as ValueError."""
    name = options.model or options.path
    assert name is not None
    field = "model" if options.path is None else "path"
    console = make_console()
    if options.denoiser is None and is_denoiser(folder := usable_path(field, name)):
        alone = describe_denoiser(folder)
        if options.json:
            print(json.dumps(dataclasses.asdict(alone), indent=2))
        else:
            _print_denoiser(alone, console)
        return 0
    record, values = describe(name, field, options.denoiser), dict[str, object]()
    if options.denoiser is not None:
        drafter = describe_denoiser(find_denoiser(record.config, options.denoiser))
        values["denoiser"] = dataclasses.asdict(drafter)
    if options.json:
        print(json.dumps(as_json(record) | values, indent=2))
        return 0
    if options.denoiser is not None:
        _print_denoiser(drafter, console)
    _print(record, console)
    return 0


def _print_denoiser(record: DenoiserRecord, console: Console) -> None:
    draft = record.draft
    parts = {
        "the hidden state of the newest token": draft.reads_hidden,
        f"bigrams of rank {draft.bigram_rank}": draft.bigram_rank > 0,
    }
    rows = {
        "denoiser of": record.backbone,
        "reads layers": ", ".join(map(str, record.reads)),
        "block size": str(record.block_size),
        "draft vocabulary": "all tokens" if draft.vocab_size is None else str(draft.vocab_size),
        "other inputs": ", ".join(name for name, has in parts.items() if has) or "nothing",
        "parameters": f"{_short(record.parameters)}; {record.num_bytes / 1e6:.1f} MB in the file",
        "n-grams": f"{record.ngrams:,} of the backbone's own answers; "
        f"{record.ngrams * NGRAM_BYTES / 1e6:.1f} MB in memory",
    }
    console.print(f"[bold]{escape(record.source)}[/]", highlight=False, soft_wrap=True)
    console.print(_grid(rows))


def as_json(record: Description) -> dict[str, object]:
    """The record as plain JSON values."""
    return {**dataclasses.asdict(record), "config": config_to_dict(record.config)}


def _print(record: Description, console: Console) -> None:
    config = record.config
    console.print(f"[bold]{escape(record.source)}[/]", highlight=False, soft_wrap=True)
    rows = {
        "layers": f"{config.context.num_layers}: "
        + ", ".join(f"{count} {kind}" for kind, count in record.layers.items()),
        "pattern": config.context.pattern,
        "width, vocabulary": f"{config.hidden_size}, {config.vocab_size}",
        "block size, mask token": f"{config.block_size}, {config.mask_token_id}",
        "parameters": _parameters(record),
    }
    attention = config.context.layers_of(AttentionSpec)
    if windows := Counter(layer.window for layer in attention if layer.window is not None):
        each = (f"{size} tokens in {count}" for size, count in windows.items())
        rows["attention window"] = f"{', '.join(each)} of {len(attention)} attention layers"
    if record.files is not None:
        rows |= _file_rows(record.files)
    if record.precision is not None:
        rows["precision"] = _precision(record.precision)
    console.print(_grid(rows))
    print_table(console, _parameter_table(record))
    print_table(console, _memory_table(record))


def _parameters(record: Description) -> str:
    towers = record.towers.values()
    each = ", ".join(f"{_short(t.total)} ({_short(t.active)} active per token)" for t in towers)
    return f"{_short(record.total)} in all; by tower {each}; {record.expert_share:.1%} in experts"


def _file_rows(files: FilesRecord) -> dict[str, str]:
    dtypes = ", ".join(f"{_short(n)} in {dtype}" for dtype, n in files.elements_by_dtype.items())
    rows = {
        "files": f"{files.files} ({_bytes(files.num_bytes)}), {files.tensors} tensors, "
        f"{files.layout} layout; {dtypes}"
    }
    return rows | ({"problem": f"[red]{escape(files.problem)}[/]"} if files.problem else {})


def _precision(record: PrecisionRecord) -> str:
    scheme = record.scheme
    groups = "" if scheme.group_size is None else f", groups of {scheme.group_size}"
    inputs = "" if scheme.activations is None else f", {scheme.activations} activations"
    kinds = [
        f"{_short(of['parameters'])} in {kind} ({_bytes(of['num_bytes'])})"
        for kind, of in record.weights.items()
    ]
    return f"{scheme.weights} weights{groups}{inputs}: {', '.join(kinds)}"


def _grid(rows: dict[str, str]) -> RichTable:
    grid = RichTable.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"[dim]{name}[/]", value)
    return grid


def _parameter_table(record: Description) -> Table:
    counts = [tower.parameters for tower in record.towers.values()]
    rows = [
        [kind, *(f"{count[kind]:,}" if kind in count else "-" for count in counts)]
        for kind in KINDS
        if any(kind in count for count in counts)
    ]
    rows.append(["total", *(f"{tower.total:,}" for tower in record.towers.values())])
    rows.append(["active per token", *(f"{tower.active:,}" for tower in record.towers.values())])
    return Table("parameters", ("kind", *record.towers), rows)


def _memory_table(record: Description) -> Table:
    of_kv, of_state = record.kv_bytes_per_token, record.state_bytes_per_row
    rows = [
        [dtype, _bytes(size), _bytes(of_kv.get(dtype)), _bytes(of_state.get(dtype))]
        for dtype, size in record.weight_bytes.items()
    ]
    return Table("memory", ("dtype", "weights", "KV per token", "Mamba state per row"), rows)


def _short(count: int) -> str:
    """A count for people: 31.6B, 2.5M, 812."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _bytes(size: int | None) -> str:
    """Binary units, as memory is sold; '-' for none."""
    if size is None:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
