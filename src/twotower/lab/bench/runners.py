"""Who is measured: each of our modes on each of our engines, and the baselines.

All take turns on every prompt, so that a slow moment of the machine falls on all of them.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from twotower.backends import (
    BackendName,
    DTypeName,
    Quantization,
    Setup,
    accelerate,
    planned_setup,
    refusal,
)
from twotower.checkpoint.files import has_quantised_blocks
from twotower.engine import GenerateOptions, TokensCommitted, stream
from twotower.engine.events import Event, Finished
from twotower.families import read_config
from twotower.lab.bench.baselines import Baseline, Measurement
from twotower.lab.bench.replay import Script, ScriptedModel
from twotower.model import ContextCache, TwoTower

AR = "ar"
PAUSE_S = 0.01  # before each start: idle threads of the one before stop spinning


@dataclass(frozen=True, kw_only=True)
class TimedPrompt:
    """One prompt that every runner continues.

    is_right: judges a text, None where texts mean nothing. scripts: by mode, the commits to repeat;
    empty where a runner decides itself what it writes, up to max_new_tokens.
    """

    ids: list[int]
    max_new_tokens: int
    is_right: Callable[[str], bool] | None = None
    scripts: Mapping[str, Script] = field(default_factory=dict)


def take_turns(
    runners: Sequence["Runner"], prompts: Sequence[TimedPrompt]
) -> Iterator[list[Measurement]]:
    """Yield each prompt's measurements in the runners' order; who starts rotates.

    Before the first prompt each runner continues it once untimed: first calls pay for later ones.
    """
    for runner in runners:
        runner.run(prompts[0])
    for turn, prompt in enumerate(prompts):
        found: dict[int, Measurement] = {}
        for place in range(len(runners)):
            number = (turn + place) % len(runners)
            time.sleep(PAUSE_S)
            found[number] = runners[number].run(prompt)
        yield [found[number] for number in range(len(runners))]


class BaselineRunner:
    """Somebody else's greedy decoding. In a replay it writes as many tokens as our AR did."""

    mode = AR

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline
        self.engine = baseline.name

    def run(self, prompt: TimedPrompt) -> Measurement:
        """Continue the prompt, timed."""
        script = prompt.scripts.get(AR)
        limit = prompt.max_new_tokens if script is None else script.num_tokens
        return self._baseline.decode(prompt.ids, limit)


def refuse_impossible(
    folder: Path,
    backends: Sequence[BackendName],
    quantizations: Sequence[Quantization],
    kv_cache_dtype: DTypeName = "auto",
) -> None:
    """ValueError (one line) if no backend runs a folder's model in any of these quantisations, and
    keeps keys and values so.
    """
    config, is_gguf = read_config(folder), has_quantised_blocks(folder)

    def setup(quantization: Quantization) -> Setup:
        planned = planned_setup(config, quantization)
        return replace(planned, is_gguf=is_gguf, kv_cache_dtype=kv_cache_dtype)

    reasons = [
        None if backend == "auto" else refusal(backend, setup(quantization))
        for backend, quantization in itertools.product(backends, quantizations)
    ]
    if None not in reasons:
        raise ValueError(
            f"backend={','.join(backends)}: {'; '.join(dict.fromkeys(filter(None, reasons)))}; "
            "use backend=eager with quantization=none"
        )


def open_engines(
    model: TwoTower, backends: Sequence[BackendName], quantizations: Sequence[Quantization]
) -> tuple[dict[str, TwoTower], list[str]]:
    """The model on each backend in each quantisation, such as "native-int8", and a line for each
    pair that cannot run: only where its backend or its quantisation runs in no other pair, as
    eager has no int8. ValueError if nothing can run.
    """
    engines: dict[str, TwoTower] = {}
    used, unable = set[str](), dict[tuple[str, str], str]()
    for backend, quantization in itertools.product(backends, quantizations):
        name = backend if quantization == "none" else f"{backend}-{quantization}"
        try:
            engines[name] = accelerate(model, backend, quantization)
            used |= {backend, quantization}
        except (ValueError, ImportError) as error:
            unable[backend, quantization] = f"{name}: {error}"
    if not engines:
        raise ValueError(f"no backend can run this model: {'; '.join(unable.values())}")
    return engines, [line for pair, line in unable.items() if not used.issuperset(pair)]


class OurRunner:
    """One of our modes on one of our engines: a backend with a quantisation."""

    def __init__(self, engine: str, model: TwoTower, options: GenerateOptions) -> None:
        self.engine = engine
        self.mode = str(options.mode)
        self._model = model
        self._options = options

    def run(self, prompt: TimedPrompt) -> Measurement:
        script = prompt.scripts.get(self.mode)
        model, options = self._model, self._options
        if script is not None:
            model = cast(TwoTower, ScriptedModel(model, script))
            options = dataclasses.replace(
                options, max_new_tokens=script.num_tokens, ignore_eos=True
            )
        return time_stream(model, prompt.ids, options)


Runner = OurRunner | BaselineRunner  # an engine in one mode


def time_stream(model: TwoTower, ids: list[int], options: GenerateOptions) -> Measurement:
    """Decode one prompt of token ids; when decoding begins is said in `Measurement`."""
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
    has_token = commit.nfe == 0  # the prompt alone gave it, as it gives a baseline's
    return Measurement(
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
