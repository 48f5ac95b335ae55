"""What native passes cost in AR steps: measured once on each machine, at the first draft.

How many tokens a pass reads at nearly the price of one depends on the processor, the sizes of the
model and the number of threads (benchmarks/pass_costs.py): on two server processors 16 tokens in
int8 cost 1.6 and 1.8 AR steps. What was measured lies in the user's cache, so that later runs
draft as the first one did.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from twotower.model.backend import Backend, ContextInput, PassCosts
from twotower.model.two_tower import TwoTower
from twotower.native.library import library_file

_PAST = 64  # tokens behind which passes are timed
_LENGTHS = (1, 2, 4, 6, 8, 12, 16, 32, 64)  # tokens of a pass: where tiles end
_DRAFTED = 8  # tokens of a denoiser's pass
_ROUNDS, _SECONDS = 3, 0.3  # at least so many, and so long
# Of each further row, which attends to a text of its own; by the bits of the weights.
_ROW = {"none": 0.025, "int8": 0.1, "int4": 0.15, "gguf": 0.15}

_log = logging.getLogger(__name__)


def of_backend(backend: Backend, model: TwoTower) -> PassCosts:
    """The costs of a backend's passes of this model, behind a text that both towers read."""
    config, tower = model.config, model.context_tower
    ids = torch.arange(_PAST).remainder(config.vocab_size).unsqueeze(0)
    cache, best_after = model.with_backend(backend).empty_cache(1), backend.best_after
    assert best_after is not None
    text = backend.context_pass(cache, ContextInput(ids))
    cache.commit(text, torch.tensor([_PAST]))

    def run(length: int) -> None:
        asked = ContextInput(ids[:, :length], is_draft=length > 1)
        best_after(backend.context_pass(cache, asked).hidden, ())

    def denoise(length: int) -> None:
        t = None if config.draft is not None else torch.ones(1)
        backend.denoise(ids[:, :length], cache.view(config.reads), t)

    file, drafts = library_file(), denoise if model.denoiser_tower is not None else None
    num_bytes = sum(tensor.nbytes for tensor in tower.state_dict().values())
    kept = Counter(str(matrix.stored_bits) for matrix in model.unread.values())
    towers = f"{config.context} {config.denoiser} {config.draft}" if drafts else config.context
    identity = f"{file.name} {towers} {num_bytes} bytes, {sorted(kept.items())} bits, with seconds"
    return pass_costs(run, backend.quantization, identity, file.parent, drafts)


def pass_costs(
    run: Callable[[int], object],
    quantization: str,
    identity: str,
    folder: Path,
    denoise: Callable[[int], object] | None = None,
) -> PassCosts:
    """The costs of passes that `run(tokens)` makes, each with its head and a choice, and of the
    denoiser's, if there is one.

    identity: whatever else they depend on. folder: keeps what was measured; if it cannot, or other
    programs were running, the next process measures again.
    """
    key = f"{identity} {quantization} {torch.get_num_threads()} threads"
    file = folder / f"pass-costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    found = _read(file)
    if found is None:
        _log.info("measuring once what passes of this model cost on this machine")
        found = measure(run, denoise)
        if not _is_busy():
            _write(file, found)
    *steps, step_s, share = found
    tokens = dict(zip(_LENGTHS, steps, strict=True))
    return PassCosts(tokens, _ROW[quantization], step_s, is_padded=False, denoiser=share or None)


def measure(
    run: Callable[[int], object], denoise: Callable[[int], object] | None = None
) -> list[float]:
    """AR steps of a pass over as many tokens as each of _LENGTHS: the fastest of several passes;
    more tokens never cost less. Then the seconds of an AR step, and a denoiser's pass as a share of
    the other tower's; 0 without one.
    """
    best, began, rounds = dict.fromkeys(_LENGTHS, math.inf), time.perf_counter(), 0
    drafting = math.inf if denoise is not None else 0.0
    run(_LENGTHS[-1])  # memory of the largest one is there
    while rounds < _ROUNDS or time.perf_counter() - began < _SECONDS:
        for length in _LENGTHS:
            best[length] = min(best[length], _seconds(run, length))
            if denoise is not None and length == _DRAFTED:
                drafting = min(drafting, _seconds(denoise, length))
        rounds += 1
    steps, most = list[float](), 1.0
    for length in _LENGTHS:
        most = max(most, round(best[length] / best[1], 2))
        steps.append(most)
    return [*steps, best[1], round(drafting / best[_DRAFTED], 3)]


def _seconds(run: Callable[[int], object], length: int) -> float:
    """Of the processor: while other programs have the core, no pass takes longer."""
    before = time.thread_time()
    run(length)
    return time.thread_time() - before


def _read(file: Path) -> list[float] | None:
    """What was measured before; None where that is not known or damaged."""
    try:
        found = [float(number) for number in json.loads(file.read_text())]
    except (OSError, TypeError, ValueError):
        return None
    least = [1.0] * len(_LENGTHS) + [1e-9, 0.0]
    if len(found) != len(least):
        return None
    pairs = zip(least, found, strict=True)
    return found if all(low <= number < math.inf for low, number in pairs) else None


def _write(file: Path, found: list[float]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / file.name
            part.write_text(json.dumps(found))
            os.replace(part, file)  # whole or not there, also beside another process
    except OSError as error:
        _log.info("cannot keep what passes cost: %s", error)


def _is_busy() -> bool:
    """Whether other programs have had more than half a core of late. They hold up the memory that
    an AR step waits for, and longer passes less: drafts would be too long for ever.
    """
    if not hasattr(os, "getloadavg"):  # Windows
        return False
    return os.getloadavg()[0] > torch.get_num_threads() + 0.5
