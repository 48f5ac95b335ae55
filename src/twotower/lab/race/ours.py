"""Our engines: the model as each runs it, and how a mode of one is timed."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor

from twotower.backends import accelerate
from twotower.engine import GenerateOptions, TokensCommitted, stream
from twotower.engine.events import Event, Finished
from twotower.lab.race.contest import Heat, Lap
from twotower.lab.race.script import ScriptedModel
from twotower.model import ContextCache, TwoTower


def run_eager(model: TwoTower) -> TwoTower:
    """Plain PyTorch: the model as it is."""
    return model


def run_native(model: TwoTower) -> TwoTower:
    """One C++ call a pass; ValueError (one line) where that cannot be."""
    return accelerate(model, "native")


def run_native_int8(model: TwoTower) -> TwoTower:
    """The same with projections rounded to int8."""
    return accelerate(model, "native", "int8")


# Name in the table -> the model as that engine runs it.
ENGINES: Mapping[str, Callable[[TwoTower], TwoTower]] = {
    "pytorch": run_eager,
    "native": run_native,
    "native-int8": run_native_int8,
}


class OurContestant:
    """One of our modes on one of our engines."""

    def __init__(self, engine: str, model: TwoTower, options: GenerateOptions) -> None:
        self.engine = engine
        self.mode = str(options.mode)
        self._model = model
        self._options = options

    def run(self, heat: Heat) -> Lap:
        script = heat.scripts.get(self.mode)
        model, options = self._model, self._options
        if script is not None:
            model = cast(TwoTower, ScriptedModel(model, script))
            options = dataclasses.replace(
                options, max_new_tokens=script.num_tokens, ignore_eos=True
            )
        return time_stream(model, heat.ids, options)


def time_stream(model: TwoTower, ids: list[int], options: GenerateOptions) -> Lap:
    """Decode one prompt of token ids; when decoding begins is told in `Lap`."""
    watched = Watched(model, len(ids))
    first: tuple[float, TokensCommitted] | None = None
    last: Event | None = None
    begin = time.perf_counter()
    for last in stream(cast(TwoTower, watched), [ids], options):
        if first is None and isinstance(last, TokensCommitted):
            first = time.perf_counter(), last
    end = time.perf_counter()
    assert isinstance(last, Finished) and first is not None
    first_at, commit = first
    done = last.completion
    has_token = commit.nfe == 0  # the prompt alone gave it, as it gives an AR rival's
    return Lap(
        tokens=done.tokens,
        seconds=end - begin,
        decode_seconds=end - (first_at if has_token else watched.read_at),
        decode_tokens=len(done.tokens) - (len(commit.tokens) if has_token else 0),
        nfe=done.nfe,
        context_forwards=done.context_forwards,
    )


class Watched:
    """A model that notes when it has read its prompt of so many tokens."""

    def __init__(self, model: TwoTower, num_prompt: int) -> None:
        self._model, self._num_prompt = model, num_prompt
        self.read_at = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def extend(self, cache: ContextCache, ids: Tensor, counts: Tensor | None = None) -> Tensor:
        hidden = self._model.extend(cache, ids, counts)
        if cache.num_past <= self._num_prompt:
            self.read_at = time.perf_counter()
        return hidden
