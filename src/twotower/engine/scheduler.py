"""Who is decoded when. `Scheduler.step` is one cycle of every row that has a slot.

The queue says whose turn it is. A row that loses its slot keeps its cache and goes on later as if
nothing had been; no text depends on who else is there.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from twotower.engine.ar import AR
from twotower.engine.attempts import attempt, each
from twotower.engine.batch import Batch, Chosen, DecodingMode, Group, kind_of
from twotower.engine.blocks import BLOCKS
from twotower.engine.events import Event, Failed
from twotower.engine.faults import failure
from twotower.engine.given import GIVEN
from twotower.engine.lookup_cache import LookupCache
from twotower.engine.mock_ar import MOCK_AR
from twotower.engine.options import EngineOptions
from twotower.engine.prefix_cache import PrefixCache
from twotower.engine.request_queue import RequestQueue
from twotower.engine.resolved import Mode
from twotower.engine.row import Row
from twotower.engine.speculative import SPECULATIVE
from twotower.memory import lacking_memory
from twotower.model import TwoTower
from twotower.model.rows import view_row
from twotower.model.two_tower import PREFILL_CHUNK

DECODING_MODES: Mapping[Mode, DecodingMode] = {
    "diffusion": BLOCKS,
    "posterior": BLOCKS,
    "predict-and-noise": BLOCKS,
    "speculative": SPECULATIVE,
    "ar": AR,
    "mock-ar": MOCK_AR,
}
# Tokens of prompts that are read at a time; then other rows decode, and may leave.
READ_TOKENS = 1024


class Scheduler:
    """Decodes the rows of a queue, up to batch_size at a time."""

    def __init__(
        self,
        model: TwoTower,
        queue: RequestQueue,
        options: EngineOptions,
        prefixes: PrefixCache | None = None,
        learnt: LookupCache | None = None,
    ) -> None:
        """prefixes, learnt: contexts and n-grams of earlier runs; by default of this one, if the
        options want any.
        """
        self._model, self._queue, self._batch_size = model, queue, options.batch_size
        self._prefixes, self._token_bytes = prefixes, model.token_bytes
        if prefixes is None and options.prefix_cache_bytes:
            self._prefixes = PrefixCache(model, options.prefix_cache_bytes)
        if learnt is None and options.lookup_cache_bytes:
            learnt = LookupCache(options.lookup_cache_bytes)
        self._learnt = learnt
        self._ngrams = [table for table in (model.ngrams, learnt) if table]
        is_apart = model.denoiser_device != model.context_device
        has_overlap = options.overlap == "on" or (options.overlap == "auto" and is_apart)
        self._pool = ThreadPoolExecutor(1, "twotower-denoiser") if has_overlap else None
        self._groups = [Group(), Group()] if has_overlap else [Group()]

    @property
    def rows(self) -> list[Row]:
        """The rows that have a slot."""
        return [row for group in self._groups for row in group.rows]

    def run(self) -> Generator[Event, None, None]:
        """Decode until the queue is over."""
        try:
            while self.rows or not self._queue.is_over:
                yield from self.step()
                if not self.rows:
                    self._queue.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def step(self) -> Iterator[Event]:
        """One cycle: commit what is drafted, evict and admit rows, prefill, draft.

        With overlap the denoiser drafts for another group of rows meanwhile; then they change.
        """
        group, before = self._groups[0], self.rows
        drafting = self._pool.submit(list, _draft(self._groups[1])) if self._pool else None
        yield from _commit(group)
        yield from self._evict(group)
        yield from self._admit(group)
        yield from self._prefill(group)
        yield from drafting.result() if drafting else _draft(group)
        self._groups.reverse()
        self._learn(before)

    def _learn(self, rows: Sequence[Row]) -> None:
        """Remember the texts of those rows that have ended: while nobody drafts, so that the same
        requests have the same drafts, and only where somebody may still draft.
        """
        left = self.rows
        if self._learnt is None or left == rows or (not left and self._queue.is_over):
            return
        present = {*left, *self._queue.paused}
        for row in rows:
            if row not in present and row.lookup is not None:
                self._learnt.learn(row.prompt, row.tokens)
                if self._learnt not in self._ngrams:
                    self._ngrams.append(self._learnt)

    def _evict(self, group: Group) -> Iterator[Event]:
        """Rows that were cancelled or are too late go, and their part of the cache with them."""
        if ended := self._queue.aborted(group.rows):
            yield from ended  # first: what follows may want memory
            numbers = {event.row for event in ended}
            group.keep(lambda row: row.index not in numbers)

    def _admit(self, group: Group) -> Iterator[Event]:
        """Give slots to rows that wait, in the queue's order, as far as memory allows."""
        newcomers = list[Row]()
        slots = Counter(row.caller for row in self.rows)
        num_waiting = self._queue.count(self._batch_size - slots.total())
        share = -(-(slots.total() + num_waiting) // len(self._groups))  # both get as many
        is_short = False  # of memory: only paused rows, whose caches are there, can enter
        while (row := self._queue.peek(slots, is_short)) is not None:
            here = [*group.rows, *newcomers]
            message = None if row in self._queue.paused else self._refusal(here, row)
            if message is not None:
                is_short = slots.total() > 0 or self._queue.peek(slots, True) is not None
                if not is_short:  # no memory will become free
                    self._queue.take(row)
                    yield Failed(row=row.index, kind="memory", message=message)
                continue
            if slots.total() >= self._batch_size:
                if not self._queue.make_room(row, slots, group):
                    break
            elif len(here) >= share:
                break
            paused = self._queue.take(row)
            slots[row.caller] += 1
            if paused is None:
                newcomers.append(row)
            else:
                group.add(paused)
        for batch in open_batches(self._model, newcomers, self._prefixes is not None):
            group.add(replace(batch, ngrams=self._ngrams))

    def _refusal(self, present: Sequence[Row], row: Row) -> str | None:
        """Why memory has no room for the keys and values of a row in a batch with those present of
        its kind; one line, or None when it has.
        """
        rows = [*(other for other in present if kind_of(other) == kind_of(row)), row]
        num_prompt = max(len(row.prompt) for row in rows)
        num_new = max(row.options.max_new_tokens + row.options.block_size for row in rows)
        num_tokens = len(rows) * (num_prompt + num_new)
        lack = lacking_memory(self._model.context_device, self._token_bytes, num_tokens)
        asked = f"a prompt of {num_prompt} tokens in {len(rows)} rows needs {lack}"
        return lack and f"{asked}; shorten it or send fewer rows at once"

    def _prefill(self, group: Group) -> Iterator[Event]:
        """Let the context tower read what was committed, and pieces of prompts."""
        yield from each(group, Batch.read)
        num_left = READ_TOKENS
        while num_left > 0 and (prompts := [b for b in group.batches if b.is_prompt]):
            slots = Counter(row.caller for row in self.rows)
            batch = min(prompts, key=lambda one: _turn(one, slots))
            group.batches.remove(batch)
            before = batch.cache.num_past
            for part in (yield from attempt(batch, lambda b: read_prompts(b, self._prefixes))):
                num_left -= len(part.rows) * (part.cache.num_past - before)
                if part.mode.start is not None and part.has_read:
                    yield from _advance(group, part, part.mode.start)
                else:
                    group.add(part)


def open_batches(model: TwoTower, rows: Sequence[Row], are_alone: bool) -> Iterator[Batch]:
    """Batches of rows of one kind whose prompts differ in length by less than a factor of two:
    reading them together, padded, costs less than twice what they cost alone.
    """
    groups: dict[object, list[list[Row]]] = {}
    for row in rows:
        size = 1 << len(row.prompt).bit_length()
        own = groups.setdefault((kind_of(row), size), [])
        if own and not are_alone and (len(own[-1]) + 1) * size <= READ_TOKENS:
            own[-1].append(row)
        else:
            own.append([row])
    for some in itertools.chain.from_iterable(groups.values()):
        mode = GIVEN if some[0].given else DECODING_MODES[some[0].options.mode]
        cache = model.empty_cache(len(some), keeps_outputs=some[0].keeps_context)
        yield Batch(model, mode, some, cache)


def read_prompts(batch: Batch, prefixes: PrefixCache | None) -> None:
    """Read prompts on, READ_TOKENS of all rows together, in pieces as the model says. A prefix
    cache reads in its own way; it keeps no outputs of the tower.
    """
    num_left = READ_TOKENS // len(batch.rows)
    if prefixes is not None and not batch.rows[0].keeps_context:
        prefixes.read_prompt(batch, num_left)
        return
    while num_left > 0 and not batch.has_read:
        batch.read(PREFILL_CHUNK)
        num_left -= PREFILL_CHUNK


def _turn(batch: Batch, slots: Mapping[str | None, int]) -> tuple[int, int, int]:
    """Whose prompts are read first: callers with few slots, then few turns, then the shortest."""
    num_slots = min(slots[row.caller] for row in batch.rows)
    length = max(len(row.prompt) for row in batch.rows)
    return num_slots, batch.cache.num_past // READ_TOKENS, length


def _draft(group: Group) -> Iterator[Event]:
    """Let the denoiser propose what the rows may write."""
    return each(group, lambda batch: batch.mode.draft(batch))


def _commit(group: Group) -> Iterator[Event]:
    """Let the context tower decide about drafts, and add what it chose to the texts."""
    batches, group.batches = group.batches, []
    for batch in batches:
        if batch.is_prompt:
            group.add(batch)
        else:
            yield from _advance(group, batch, batch.mode.choose)


def _advance(
    group: Group, batch: Batch, choose: Callable[[Batch], list[Chosen]]
) -> Iterator[Event]:
    """Hand each row what is chosen for it; those that go on stay in the group. One that cannot take
    its tokens (its text, its filters) ends alone.
    """

    def work(part: Batch) -> None:
        part.chosen = choose(part)

    for part in (yield from attempt(batch, work)):
        chosen, going = part.chosen, []
        part.chosen = part.drafts = ()
        for slot, (row, own) in enumerate(zip(part.rows, chosen, strict=True)):
            try:
                yield row.commit(*own)
                if not row.is_finished:
                    going.append(slot)
                else:
                    length = len(row.prompt) + len(row.tokens)
                    is_kept = row.keeps_context
                    yield row.finished(view_row(part.cache, slot, length) if is_kept else None)
            except Exception as error:
                yield failure(row, error)
        if going:
            group.add(part.keep(going))
