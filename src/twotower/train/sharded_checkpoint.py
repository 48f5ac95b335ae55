"""Checkpoints that several processes write, each its own part, and any number of them reads.

Decides the order of the writing: all into a folder aside, synced, then the first process describes
it in run.json and gives it its name. The format of the tensors is PyTorch's (distributed
checkpoint); its index is a pickle, so read only checkpoints that you trust.
"""

import dataclasses
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from twotower.train.processes import Processes, SharedError
from twotower.train.run_folder import FORMAT, POSITION_FILE, Position, RunFolder, write_json

State = dict[str, Any]  # tensors, sharded or not, by nested names


def save_sharded(
    folder: RunFolder, position: Position, state: State, keep: int, processes: Processes
) -> None:
    """Write a checkpoint from all processes, then delete all but the newest `keep`.

    All must see the same file system. SharedError (one line) if it cannot be written.
    """
    partial = folder.partial(position.step)
    processes.on_first(lambda: shutil.rmtree(partial, ignore_errors=True))
    try:
        with _quiet():
            save(state, storage_writer=FileSystemWriter(partial, sync_files=True))
    except CheckpointException as error:
        raise SharedError(
            f"checkpoint: cannot write {partial} ({_reason(error)}); earlier checkpoints are "
            "whole: free some space and run the same command again"
        ) from None
    processes.on_first(lambda: _finish(folder, position, keep))


def load_sharded(folder: Path, state: Mapping[str, Any]) -> None:
    """Fill the tensors of `state`, however they are sharded now.

    ValueError (one line) if one is missing, of another shape or unreadable.
    """
    try:
        with _quiet():
            load(dict(state), storage_reader=FileSystemReader(folder))
    except CheckpointException as error:
        raise SharedError(
            f"checkpoint: {folder} cannot be read ({_reason(error)}); delete it to go on from the "
            "one before"
        ) from None


def _finish(folder: RunFolder, position: Position, keep: int) -> None:
    partial = folder.partial(position.step)
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    content = {"format": FORMAT, "files": files} | dataclasses.asdict(position)
    write_json(partial / POSITION_FILE, content)
    partial.rename(folder.sharded(position.step))
    folder.drop_all_but(keep)


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch warns of a single process, and logs what we report in one line."""
    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(before)


def _reason(error: CheckpointException) -> str:
    """The first process's failure, on one line."""
    rank, (failure, _) = min(error.failures.items())
    return f"process {rank}: {' '.join(str(failure).split())[:200] or type(failure).__name__}"
