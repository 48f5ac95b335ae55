"""A contest on a real model: our modes, llama.cpp and transformers on the same weights in the same
quantisation, each in a process of its own, plain and with their own lookup of n-grams.

All of the same quantisation continue one prompt, one after the other, before the next prompt
begins; who starts rotates. Ratios are of the same prompt; medians are shown.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from twotower.backends import BackendName, DTypeName, Quantization
from twotower.checkpoint import export_transformers
from twotower.checkpoint.gguf import Precision, export_gguf
from twotower.lab.bench.baselines import SPECULATIONS, Measurement, gguf_quantization
from twotower.lab.bench.contestant import OURS, Contestant, label
from twotower.lab.report import Record, Table, number
from twotower.memory import lacking_room
from twotower.model import TwoTower

_PRECISIONS: Mapping[Quantization, Precision] = {"int8": "q8_0", "int4": "q4_0"}
Show = Callable[[str], None]
Answers = Mapping[Contestant, Sequence[Measurement]]
_COLUMNS = (
    "engine", "quantization", "mode", "decode ms", "x plain", "x best", "prompt tok/s",
    "tokens/pass", "as plain", "as float32",
)  # fmt: skip


def contestants(
    load: Callable[[], TwoTower],
    file: Path,
    compared: tuple[Sequence[BackendName], Sequence[Quantization]],
    threads: int,
    context: int,
    folder: Path,
    denoiser: str | None = None,
    kv_cache_dtype: DTypeName = "auto",
) -> tuple[list[Contestant], list[str]]:
    """Who takes part, by quantisation, and a line for each that cannot; files of others go to the
    folder.

    load: the weights for those files in the checkpoint's dtype, which is that of all engines
    without quantisation; called once if any is to be written, and kept no longer than this takes.
    file: the model's own; compared: our backends, and quantisations of all; context: tokens of the
    longest prompt and its answer; denoiser: the folder of a thin one beside the model;
    kv_cache_dtype: ours. llama.cpp runs a GGUF file that has that quantisation as it is, else an
    export.
    """
    load = cache(load)
    backends, quantizations = compared
    found: list[Contestant] = []
    missing: list[str] = []
    for own in quantizations:
        each = partial(Contestant, quantization=own, threads=threads, context=context)
        given = {"denoiser": denoiser, "kv_cache_dtype": kv_cache_dtype}
        ours = partial(each, engine=OURS, file=str(file), **given)
        found += [ours(mode=m, backend=b) for b in backends for m in ("ar", "speculative")]
        sources: dict[str, tuple[Callable[[], Path], Sequence[str]]] = {
            "llama.cpp": (partial(_gguf, load, file, own, folder), ("plain", *SPECULATIONS))
        }
        if own == "none":
            exported = partial(_exported, load, folder / "transformers")
            sources["transformers"] = exported, ("plain", "lookup")
        for engine, (source, modes) in sources.items():
            try:
                name = str(source())
            except ValueError as error:  # a model that it cannot represent
                missing.append(f"{engine} {own}: {error}")
                continue
            found += [each(engine=engine, mode=mode, file=name) for mode in modes]
    return found, missing


def _exported(load: Callable[[], TwoTower], folder: Path) -> Path:
    export_transformers(load(), folder)
    return folder


def _gguf(
    load: Callable[[], TwoTower], file: Path, quantization: Quantization, folder: Path
) -> Path:
    if quantization == "gguf" or (
        file.suffix == ".gguf" and gguf_quantization(file) == quantization
    ):
        return file
    target, model = folder / f"{quantization}.gguf", load()
    stored: Any = str(model.context_tower.embeddings.weight.dtype).removeprefix("torch.")
    export_gguf(model, target, dtype=_PRECISIONS.get(quantization, stored))
    return target


class _Process:
    """The process of a contestant, or of several that differ in our mode; asked a prompt at a
    time.
    """

    def __init__(self, engine: str) -> None:
        command = [sys.executable, "-m", "twotower.lab.bench.contestant"]
        # As our other verbs ask for; llama.cpp's threads would be slowed down.
        waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if engine == OURS else {}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**waiting, **os.environ},
            start_new_session=True,  # Ctrl-C is ours
        )

    def start(self, who: Contestant) -> None:
        """Load it. ValueError where it cannot run."""
        self._ask(asdict(who))

    def decode(self, ids: Sequence[int], num_new: int, mode: str) -> Measurement:
        """Continue a prompt. ValueError where it could not."""
        asked = {"ids": list(ids), "max_new_tokens": num_new, "mode": mode}
        return Measurement(**self._ask(asked))

    def _ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line or '{"error": "its process has ended"}')
        if answer.get("error"):
            raise ValueError(str(answer["error"]))
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes, whatever they hold


def _require_room(who: Contestant) -> None:
    """ValueError (one line) where memory has no room for the weights of another program beside
    those that are loaded: the system would end one of them. Ours refuse that themselves.
    """
    if who.engine == OURS:
        return
    given = Path(who.file)
    files = [given, *given.rglob("*")]
    num_bytes = sum(file.stat().st_size for file in files if file.is_file())
    if (lack := lacking_room(torch.device("cpu"), num_bytes)) is not None:
        raise ValueError(f"needs {lack} beside the others")


@contextmanager
def _opened(
    who: Sequence[Contestant], first: Sequence[int], missing: list[str], show: Show
) -> Iterator[list[tuple[Contestant, _Process]]]:
    """Those that can continue a first prompt; first calls pay for later ones."""
    with ExitStack() as stack:
        found, known = list[tuple[Contestant, _Process]](), dict[Contestant, _Process]()
        for one in who:
            show(f"loading {one.name}")
            weights = replace(one, mode="") if one.engine == OURS else one
            try:
                if (process := known.get(weights)) is None:
                    _require_room(one)
                    process = _Process(one.engine)
                    stack.callback(process.close)
                    process.start(one)
                    known[weights] = process
                process.decode(first, 8, one.mode)
            except ValueError as error:
                missing.append(f"{one.name}: {error}")
                continue
            found.append((one, process))
        yield found


def run_contest(
    who: Sequence[Contestant], prompts: Sequence[Sequence[int]], num_new: int, show: Show
) -> tuple[dict[Contestant, list[Measurement]], list[str]]:
    """Everybody's answers in the prompts' order, and a line for each that could not start or left
    a prompt unanswered. show: told what begins, for each contestant and each of its prompts.
    """
    answers: dict[Contestant, list[Measurement]] = {}
    missing: list[str] = []
    for quantization in dict.fromkeys(one.quantization for one in who):
        own = [one for one in who if one.quantization == quantization]
        with _opened(own, prompts[0], missing, show) as opened:
            for turn, prompt in enumerate(prompts):
                first = turn % max(1, len(opened))
                for one, process in opened[first:] + opened[:first]:
                    show(one.name)
                    try:
                        found = process.decode(prompt, num_new, one.mode)
                    except ValueError as error:
                        missing.append(f"{one.name}: {error}")
                        opened.remove((one, process))
                        answers.pop(one, None)
                        continue
                    answers.setdefault(one, []).append(found)
    return answers, missing


def summarise(answers: Answers, prompts: Sequence[Sequence[int]]) -> list[dict[str, object]]:
    """A record of each contestant.

    x_plain: over the same engine without drafts; x_best: over the fastest of the others in the same
    quantisation, prompt by prompt; same_as_plain, same_as_float32: texts that are that engine's
    own without drafts, and also without quantisation.
    """
    records: list[dict[str, object]] = []
    for one, own in answers.items():
        peers = {
            w: a
            for w, a in answers.items()
            if w.quantization == one.quantization and w.engine != one.engine
        }
        plain = _find(answers, one, one.quantization)
        best = min(peers, key=lambda w: statistics.median(map(_decode_ms, peers[w])), default=None)
        passes = sum(a.context_forwards - 1 for a in own) if one.engine == OURS else 0
        records.append(
            {
                **asdict(one),
                "file": Path(one.file).name,
                "decode_ms": statistics.median(map(_decode_ms, own)),
                "x_plain": _ratio(plain, own),
                "x_best": None if best is None else _ratio(peers[best], own),
                "best": None if best is None else best.name,
                "prompt_tokens_per_s": statistics.median(
                    len(p) / (a.seconds - a.decode_seconds)
                    for p, a in zip(prompts, own, strict=True)
                ),
                "tokens_per_pass": sum(len(a.tokens) - 1 for a in own) / passes if passes else None,
                "same_as_plain": _same(plain, own),
                "same_as_float32": _same(_find(answers, one, "none"), own),
                "n": len(own),
            }
        )
    return records


def _find(
    answers: Answers, like: Contestant, quantization: Quantization
) -> Sequence[Measurement] | None:
    """Answers of the same engine in some quantisation, without drafts."""
    wanted = like.engine, like.backend, quantization
    for one, own in answers.items():
        if (one.engine, one.backend, one.quantization) == wanted and one.mode in ("ar", "plain"):
            return own
    return None


def _decode_ms(answer: Measurement) -> float:
    return 1e3 * answer.decode_seconds / max(1, len(answer.tokens) - 1)


def _ratio(slow: Sequence[Measurement] | None, fast: Sequence[Measurement]) -> float | None:
    if slow is None:
        return None
    pairs = zip(slow, fast, strict=True)
    return statistics.median(_decode_ms(a) / _decode_ms(b) for a, b in pairs)


def _same(first: Sequence[Measurement] | None, second: Sequence[Measurement]) -> int | None:
    if first is None:
        return None
    return sum(a.tokens == b.tokens for a, b in zip(first, second, strict=True))


def contest_table(records: Sequence[Record], title: str) -> Table:
    """What a token costs each, beside the others in the same quantisation."""
    rows = [
        [
            label(r["engine"], r["backend"]), r["quantization"], r["mode"],
            number(r["decode_ms"]), number(r["x_plain"]), number(r["x_best"]),
            number(r["prompt_tokens_per_s"], 0), number(r["tokens_per_pass"]),
            _count(r, "same_as_plain"), _count(r, "same_as_float32"),
        ]
        for r in records
    ]  # fmt: skip
    return Table(title, _COLUMNS, rows)


def _count(record: Record, field: str) -> str:
    return "-" if record[field] is None else f"{record[field]}/{record['n']}"
