"""One writer at a time: locks that the system lets go when their process ends, however it ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process; False when another has it.

    True where there are no such locks: on Windows, and on some network file systems.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes a folder, which may be replaced meanwhile. ValueError (one
    line) when another is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f".{folder.name}.lock"
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    is_ours = try_lock(descriptor) and _is_there(file, descriptor)
    try:
        if not is_ours:
            raise ValueError(
                f"{folder}: is being written by another process; wait for its end, or choose "
                "another place"
            )
        yield
    finally:
        if is_ours:
            file.unlink(missing_ok=True)  # before it is let go: who has opened it will see that
        os.close(descriptor)


def _is_there(file: Path, descriptor: int) -> bool:
    """Whether the open file is the one of that name: its last owner removes it."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
