"""Reject files that should not be committed: no newline at the end, over 500 kB, notebook output,
records that name a place of the machine that made them.

The size limit leaves out shipped models and recorded test data, which are large by intent.
Usage: python scripts/check_files.py FILE...   (no FILE: every file that git tracks here)
"""

import json
import re
import subprocess
import sys
from pathlib import Path

MAX_BYTES = 500_000
RECORDS = "benchmarks/results/"
PLACE = re.compile(rb'[" =]/(tmp|root|home|Users)/')
LARGE_BY_INTENT = ("src/twotower/assets/", "models/", "tests/golden/")


def is_text(data: bytes) -> bool:
    """A NUL byte in the first 8 kB marks a binary file, as git decides it."""
    return b"\0" not in data[:8192]


def has_output(notebook: bytes) -> bool:
    cells = json.loads(notebook).get("cells", [])
    return any(cell.get("outputs") for cell in cells)


def faults(name: str, data: bytes) -> list[str]:
    """What is wrong with the file `name` (path from the repository's root, with slashes)."""
    found = []
    allowed_large = name.startswith(LARGE_BY_INTENT)
    if len(data) > MAX_BYTES and not allowed_large:
        found.append(f"{len(data)} bytes; at most {MAX_BYTES} outside {', '.join(LARGE_BY_INTENT)}")
    if data and is_text(data) and not allowed_large:
        if not data.endswith(b"\n"):
            found.append("no newline at the end")
        elif data.endswith(b"\n\n"):
            found.append("blank lines at the end")
    if name.startswith(RECORDS) and (place := PLACE.search(data)):
        found.append(f"names {place[0][1:].decode()}, which no other machine has; leave it out")
    if name.endswith(".ipynb") and has_output(data):
        found.append("notebook with output; clear it")
    return found


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, text=True)
    return [name for name in listing.stdout.split("\0") if name]


def main(names: list[str]) -> int:
    bad = 0
    for name in names or tracked_files():
        path = Path(name)
        if not path.is_file() or path.is_symlink():
            continue
        for fault in faults(path.as_posix(), path.read_bytes()):
            print(f"{name}: {fault}")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
