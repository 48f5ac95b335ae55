"""What a path may be, of a file or a folder, there or yet to be made."""

import errno
import os
import stat
from pathlib import Path

from twotower.arguments import check


def usable_path(name: str, path: str | Path) -> Path:
    """The path, at which there may be nothing; ValueError (one line) where `a_path` finds fault."""
    check({name: Path(path)}, {name: a_path})
    return Path(path)


def a_path(value: object) -> str | None:
    """A path that is not too long, has no NUL byte or half a character, and whose file or folder,
    if there is one, may be read.
    """
    if not isinstance(value, Path):
        return "must be a path"
    try:
        mode = os.stat(value).st_mode
        needed = os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)
        is_effective = os.access in os.supports_effective_ids
        if os.access(value, needed, effective_ids=is_effective):
            return None
        reason = os.strerror(errno.EACCES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    return f"cannot be used ({reason}); give another path"
