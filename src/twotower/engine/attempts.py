"""Work on batches, any of which may fail: what becomes of the rows at fault, and of the others."""

import logging
import time
from collections.abc import Callable, Generator, Iterable

from twotower.engine.batch import Batch, Group
from twotower.engine.blocks import RowsAborted
from twotower.engine.events import Event
from twotower.engine.faults import EngineDeadError, failed, failure

_log = logging.getLogger(__name__)
# What is done with a batch; where it fails, caches, texts and randomness are as they were.
Work = Callable[[Batch], Iterable[Event] | None]


def each(group: Group, work: Work) -> Generator[Event, None, None]:
    """Work on what decodes of a group, and leave out what fails."""
    batches: list[Batch] = []
    for batch in group.batches:
        batches += [batch] if batch.is_prompt else (yield from attempt(batch, work))
    group.batches = batches


def attempt(batch: Batch, work: Work) -> Generator[Event, None, list[Batch]]:
    """Work on a batch; where that fails, on each of its rows alone. Returns what succeeded.

    The work must leave caches, texts and randomness as they are where it fails. A row whose own
    work fails ends with Failed; steps of a second try are reported again.
    """
    before = [row.nfe for row in batch.rows]
    try:
        yield from work(batch) or ()
        return [batch]
    except EngineDeadError:
        raise
    except RowsAborted:
        now = time.monotonic()
        yield from (failed(row.index, row.abort_reason(now) or "cancelled") for row in batch.rows)
        return []
    except Exception as error:
        if len(batch.rows) == 1:
            yield failure(batch.rows[0], error)
            return []
        _log.info("a pass of %d rows failed (%s): one by one", len(before), type(error).__name__)
    done: list[Batch] = []
    for slot, (row, nfe) in enumerate(zip(batch.rows, before, strict=True)):
        row.nfe = nfe
        done += yield from attempt(batch.part([slot]), work)
    return done
