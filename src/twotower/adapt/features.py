"""What a thin denoiser reads of the backbone's own answers, computed once and kept on disk.

Training reads it thousands of times; to let the context tower read the texts anew at every step
would take twenty times as long. The passes that write an answer leave it in their cache; only where
they are gone the text is read once more. A part is one file of some answers, written whole or not
at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower.adapt.answers import Answer
from twotower.adapt.files import reading, save_whole
from twotower.config import TowerConfig
from twotower.layers.attention import KV
from twotower.model import ContextCache, TwoTower
from twotower.specs import AttentionSpec

READ_AT_ONCE = 512  # tokens
PART = 64  # answers of a file


def attended(tower: TowerConfig, reads: Sequence[int]) -> list[int]:
    """The layers among `reads` that leave keys and values."""
    return [read for read in dict.fromkeys(reads) if isinstance(tower.layers[read], AttentionSpec)]


Columns = dict[str, Tensor]  # hidden (S, D), k.N and v.N (S, Hk, A) of each layer N, in bfloat16


def columns_of(context: ContextCache, keyed: Sequence[int]) -> Columns:
    """Copies of what layers and the last norm have made of a text, the one row of a cache."""
    assert context.outputs is not None
    found = {"hidden": context.outputs}
    for layer in keyed:
        state = context.layers[layer]
        assert isinstance(state, KV)
        found |= {f"k.{layer}": state.k, f"v.{layer}": state.v}
    return {name: part[0].bfloat16().cpu() for name, part in found.items()}


@torch.no_grad()
def read_columns(model: TwoTower, tokens: Sequence[int], keyed: Sequence[int]) -> Columns:
    """The columns of a text, by passes of its own over all tokens but the last."""
    cache = model.empty_cache(1, keeps_outputs=True)
    read = torch.tensor([tokens[: max(1, len(tokens) - 1)]])
    for chunk in read.split(READ_AT_ONCE, dim=1):
        model.extend(cache, chunk)
    return columns_of(cache, keyed)


def write_part(
    model: TwoTower,
    answers: Sequence[Answer],
    reads: Sequence[int],
    file: Path,
    known: Mapping[int, Columns] = MappingProxyType({}),
) -> None:
    """What layers `reads` and the last norm make of answers, after one another, in bfloat16: zeros
    for the last token of each, behind which nothing is drafted. known: by the index of answers,
    whose text need not be read again.

    ValueError (one line) where the disk is full; what was there is unchanged.
    """
    columns, keyed = dict[str, list[Tensor]](), attended(model.config.context, reads)
    tokens = [answer.prompt + answer.tokens for answer in answers]
    for index, text in enumerate(tokens):
        own = known[index] if index in known else read_columns(model, text, keyed)
        for name, column in own.items():
            rest = column.new_zeros(len(text) - len(column), *column.shape[1:])
            columns.setdefault(name, []).extend((column, rest))
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    tensors["tokens"] = torch.tensor([token for text in tokens for token in text])
    tensors["lengths"] = torch.tensor([len(text) for text in tokens])
    tensors["starts"] = torch.tensor([len(a.prompt) for a in answers])
    save_whole(tensors, file)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an answer lies in its part: tokens first to last, the answer from `start` on."""

    file: Path
    first: int
    last: int
    start: int


def find_places(folder: Path, reads: Sequence[int] = ()) -> list[Place]:
    """All answers of a folder's parts, in order. ValueError (one line) for a file that is none, and
    for one that lacks keys of the layers.
    """
    places = []
    for file in sorted(folder.glob("part-*.safetensors")):
        remedy = "remove it and run the stage answers again"
        with reading(file, remedy, "a part that"), safe_open(file, framework="pt") as part:
            lengths, starts = (part.get_tensor(name) for name in ("lengths", "starts"))
            names = {*part.keys()}
        if not {f"k.{read}" for read in reads} <= names:
            raise ValueError(f"{folder}: is of other layers; run the stage answers first")
        first = 0
        for length, start in zip(lengths.tolist(), starts.tolist(), strict=True):
            places.append(Place(file=file, first=first, last=first + length, start=start))
            first += length
    return places


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some answers, right-padded to S tokens: tokens (B, S), hidden (B, S, D), a KV of each read
    layer; lengths and starts (B,) of text and answer.
    """

    tokens: Tensor
    hidden: Tensor
    states: dict[int, KV]
    lengths: Tensor
    starts: Tensor

    def to(self, device: torch.device) -> "Rows":
        """The same on a device."""
        states = {i: KV(*(part.to(device) for part in kv)) for i, kv in self.states.items()}
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return Rows(states=states, **moved)


def is_whole(file: Path, count: int, reads: Sequence[int]) -> bool:
    """Whether a part holds so many answers, and the keys of layers that have some."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as part:
            has_keys = {f"k.{read}" for read in reads} <= {*part.keys()}
            return has_keys and len(part.get_tensor("lengths")) == count
    except (OSError, SafetensorError):
        return False


class Features:
    """The parts of a folder, opened once. reads: layers that have keys."""

    def __init__(self, reads: Sequence[int]) -> None:
        self._reads = reads
        self._open: dict[Path, dict[str, Tensor]] = {}

    def rows(self, places: Sequence[Place]) -> Rows:
        """The answers at some places, in float32."""

        def padded(name: str, kind: torch.dtype = torch.float32) -> Tensor:
            parts = [self._part(p.file)[name][p.first : p.last].to(kind) for p in places]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

        return Rows(
            tokens=padded("tokens", torch.int64),
            hidden=padded("hidden"),
            states={read: KV(padded(f"k.{read}"), padded(f"v.{read}")) for read in self._reads},
            lengths=torch.tensor([p.last - p.first for p in places]),
            starts=torch.tensor([p.start for p in places]),
        )

    def _part(self, file: Path) -> dict[str, Tensor]:
        if file not in self._open:
            with safe_open(file, framework="pt") as part:
                self._open[file] = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118
        return self._open[file]
