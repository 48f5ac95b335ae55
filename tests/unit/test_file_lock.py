"""Locks: one writer at a time, and none that outlives its process."""

import subprocess
import sys
from pathlib import Path

import pytest

from twotower.file_lock import only_writer


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    """Guards a checkpoint that two processes write at once: shards of both."""
    folder = tmp_path / "model"
    with only_writer(folder):
        with pytest.raises(ValueError, match="by another process"), only_writer(folder):
            pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(folder):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_does_not_outlive_its_process(tmp_path: Path) -> None:
    """Guards a folder that nobody may write any more after a kill."""
    code = (
        "import os, pathlib, sys; from twotower.file_lock import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    folder = tmp_path / "model"
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == 9
    assert (tmp_path / ".model.lock").exists()
    with only_writer(folder):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_writer(tmp_path / "a"):
        raise KeyError
    with only_writer(tmp_path / "a"):
        pass
