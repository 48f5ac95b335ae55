"""What the machine tells about its memory."""

from pathlib import Path

import pytest
import torch

from twotower import measure

CPU = torch.device("cpu")


def test_free_memory_is_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:    1234 kB\nBuffers:  5 kB\n")
    monkeypatch.setattr(measure, "_MEMINFO", file)
    assert measure.available_bytes(CPU) == 1234 * 1024
    file.write_text("MemTotal:  9 kB\n")
    assert measure.available_bytes(CPU) is None
    monkeypatch.setattr(measure, "_MEMINFO", tmp_path / "missing")
    assert measure.available_bytes(CPU) is None


def test_unknown_devices_have_no_figure() -> None:
    assert measure.available_bytes(torch.device("meta")) is None


@pytest.mark.gpu
def test_free_memory_of_a_gpu() -> None:
    found = measure.available_bytes(torch.device("cuda"))
    assert found is not None and found > 0
