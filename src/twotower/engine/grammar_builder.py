"""Grammars made ready by the library, in processes of their own.

Building a grammar may take any time and memory, or crash the library: so each is built in a process
with limits, which holds it as long as it is wanted. What it cannot build is refused in one line.
"""

import dataclasses
import json
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

from twotower.engine import grammar_child as child
from twotower.engine.fork_server import Process, ProcessDied, Root
from twotower.engine.grammar import Grammar, one_line
from twotower.engine.grammar_prefixes import prefixes_of
from twotower.tokenizer import Tokenizer

BUILD_S = 10.0
_BUILD_CPU_S = 2.0
_MEMORY = 128 << 20  # of a process, more than with no grammar at all
_MAX_GRAMMARS = 128  # in all, with the memory of all
_MAX_BYTES = 512 << 20
_MAX_KEPT = 64, 128 << 20  # grammars, and their bytes, of those that no row uses
_BUILDS_AT_A_TIME = max(1, (os.cpu_count() or 1) // 2)


class GrammarsFull(ValueError):
    """No more grammars fit beside those in use; another try may succeed when some have ended."""


class Built:
    """A grammar that the library has accepted, in the process that holds it."""

    def __init__(self, process: Process, num_bytes: int, first: bytes) -> None:
        """first: the reply on what can come before all others, equal for every row."""
        self.process, self.num_bytes, self.first = process, num_bytes, first


class _Builder:
    """Makes grammars for one vocabulary and keeps those that were used last. For all threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._root = Root(Path(child.__file__), partial(_read_vocabulary, tokenizer))
        self._kept: OrderedDict[Grammar, Built] = OrderedDict()
        # Those that rows hold, too.
        self._alive: weakref.WeakValueDictionary[Grammar, Built] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_BUILDS_AT_A_TIME)

    def get(self, grammar: Grammar, wall_s: float) -> Built:
        """The grammar, built if it is not there. ValueError (one line) for one that cannot be;
        GrammarsFull.
        """
        end_s = time.monotonic() + wall_s
        if (known := self.known(grammar)) is not None:
            return known
        if not self._places.acquire(timeout=wall_s):
            raise GrammarsFull("grammar: others are being built; try again later")
        try:
            if (known := self.known(grammar)) is not None:  # made while this one waited
                return known
            self._make_room()
            built = self._build(grammar, max(end_s - time.monotonic(), 0.01))
        finally:
            self._places.release()
        with self._lock:
            self._kept[grammar] = self._alive[grammar] = built
        return built

    def known(self, grammar: Grammar) -> Built | None:
        """The grammar if it is there."""
        with self._lock:
            if (built := self._alive.get(grammar)) is not None:
                self._kept[grammar] = built
                self._kept.move_to_end(grammar)
            return built

    def _make_room(self) -> None:
        """Give up what was used longest ago; GrammarsFull when rows hold too much."""
        with self._lock:
            while self._kept and not _fits(self._kept, *_MAX_KEPT):
                self._kept.popitem(last=False)
            while self._kept and not _fits(self._alive, _MAX_GRAMMARS, _MAX_BYTES):
                self._kept.popitem(last=False)
            if not _fits(self._alive, _MAX_GRAMMARS, _MAX_BYTES):
                raise GrammarsFull("grammar: too many different ones are in use; try again later")

    def _build(self, grammar: Grammar, wall_s: float) -> Built:
        request = child.BUILD + json.dumps(dataclasses.asdict(grammar)).encode()
        process = self._copy()
        try:
            reply, _ = process.ask(request, _BUILD_CPU_S, wall_s)
            return Built(process, child.from_numbers(reply[:4])[0] << 10, reply[4:])
        except ProcessDied:
            raise ValueError(
                f"{grammar.kind}: building it needs more than {min(_BUILD_CPU_S, wall_s):.1f} s or "
                f"{_MEMORY >> 20} MiB, or is too deep; give a simpler one"
            ) from None
        except ValueError as error:
            line = one_line(str(error))
            is_told = line.startswith(("json_schema", "tools: "))  # the field whose rule it is
            raise ValueError(line if is_told else f"{grammar.kind}: {line}") from None

    def _copy(self) -> Process:
        try:
            return self._root.copy()
        except ProcessDied:  # somebody has ended it, or the system has no process for us
            message = "grammar: there is no process for it at present; try again later"
            raise GrammarsFull(message) from None


def _fits(grammars: Mapping[Grammar, Built], most: int, most_bytes: int) -> bool:
    """Whether there is room for another one."""
    num_bytes = [built.num_bytes for built in grammars.values()]
    return len(num_bytes) < most and sum(num_bytes) < most_bytes


@lru_cache(maxsize=8)
def _builder(tokenizer: Tokenizer) -> _Builder:
    return _Builder(tokenizer)


def _read_vocabulary(tokenizer: Tokenizer, process: Process) -> None:
    if find_spec("llguidance") is None:
        raise ValueError(
            "grammar needs the library llguidance; install it with: pip install '.[serve]'"
        )
    size = child.numbers([tokenizer.vocab_size])
    try:
        process.ask(child.VOCABULARY + size + tokenizer.json_text.encode(), 60.0, 120.0)
    except (ValueError, ProcessDied) as error:
        raise ValueError(
            f"grammar: this tokenizer's tokens cannot be read as bytes ({one_line(str(error))}); "
            "use a byte-level BPE tokenizer"
        ) from None
    process.limit_memory(_MEMORY)


def build(grammar: Grammar, tokenizer: Tokenizer, wall_s: float = BUILD_S) -> Built:
    """Make a grammar ready, in at most so many seconds; it stays so while the result is held.

    ValueError (one line) for a grammar that is damaged, uses what the library cannot keep, or takes
    too much to build; GrammarsFull.
    """
    prefixes_of(tokenizer)  # here, where nobody else waits for it
    return _builder(tokenizer).get(grammar, wall_s)


def find(grammar: Grammar, tokenizer: Tokenizer) -> Built | None:
    """The grammar if it is ready, at once."""
    return _builder(tokenizer).known(grammar)
