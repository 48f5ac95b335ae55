"""An engine of a contest in a process of its own: `python -m twotower.lab.bench.contestant`.

Threads that one engine leaves spinning would slow another down in the same process. stdin has a
contestant as a line of JSON, then a request a line; stdout has a line when it is ready, and an
answer a line. One process decodes in all of our modes, so that the weights are in memory once.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from twotower.backends import BackendName, DTypeName, Quantization
from twotower.engine import GenerateOptions
from twotower.lab.bench.baselines import Baseline, LlamaCpp, Measurement, Transformers
from twotower.lab.bench.runners import time_stream
from twotower.loading import Placement, load

OURS = "twotower"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An engine with weights of some quantisation, and how it decodes."""

    engine: str  # twotower, llama.cpp or transformers
    quantization: Quantization
    mode: str  # ours; plain, or what drafts, for others
    file: str
    threads: int
    context: int  # tokens of the longest prompt and what is written after it
    denoiser: str | None = None  # ours: the folder of a thin one
    backend: BackendName = "auto"  # ours
    kv_cache_dtype: DTypeName = "auto"  # ours

    @property
    def name(self) -> str:
        """In tables."""
        return f"{label(self.engine, self.backend)} {self.quantization} {self.mode}"


Decode = Callable[[Sequence[int], int, str], Measurement]
"""Token ids of a prompt, most new tokens, a mode -> what it took."""


def label(engine: str, backend: str) -> str:
    """An engine in tables, with the backend that was asked for."""
    return engine if backend == "auto" else f"{engine} {backend}"


def open_contestant(who: Contestant) -> Decode:
    """Load it; ValueError (one line) where it cannot run."""
    torch.set_num_threads(who.threads)
    return _twotower(who) if who.engine == OURS else _baseline(who)


def _twotower(who: Contestant) -> Decode:
    placement = Placement(
        model=who.file, denoiser=who.denoiser, quantization=who.quantization,
        kv_cache_dtype=who.kv_cache_dtype, backend=who.backend, threads=who.threads,
    )  # fmt: skip
    model = load(placement, only_decodes=True).model

    def decode(ids: Sequence[int], num_new: int, mode: str) -> Measurement:
        options = GenerateOptions(mode=mode, max_new_tokens=num_new, temperature=0.0)  # type: ignore[arg-type]
        return time_stream(model, list(ids), options)

    return decode


def _baseline(who: Contestant) -> Decode:
    file, own = Path(who.file), who.mode
    baseline: Baseline = (
        Transformers(file, who.threads, "auto", lookup=own == "lookup")
        if who.engine == "transformers"
        else LlamaCpp(file, who.threads, own, who.context)
    )
    return lambda ids, num_new, _: baseline.decode(ids, num_new)


def main() -> None:
    """Decode until nobody asks any more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand between answers
    with suppress(BrokenPipeError):  # who asked has ended
        _serve(partial(print, file=out, flush=True))
    os._exit(0)  # llama.cpp's server thread may take long to end


def _serve(write: Callable[[str], object]) -> None:
    who = Contestant(**json.loads(sys.stdin.readline()))
    try:
        decode = open_contestant(who)
        write(json.dumps({"error": None}))
        for line in sys.stdin:
            asked = json.loads(line)
            write(json.dumps(asdict(decode(asked["ids"], asked["max_new_tokens"], asked["mode"]))))
    except ValueError as error:
        write(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
