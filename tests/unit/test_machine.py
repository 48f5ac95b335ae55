"""What the machine tells about its memory and its cores."""

import os
from pathlib import Path

import pytest
import torch

from twotower import cores, loading, memory

CPU = torch.device("cpu")


def test_free_memory_is_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:    1234 kB\nBuffers:  5 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", file)
    assert memory.available_bytes(CPU) == 1234 * 1024
    assert memory.available_bytes(CPU, 10**18) == 1234 * 1024
    assert memory.available_bytes(CPU, 1) != 1234 * 1024  # it is not read for what is there anyway
    file.write_text("MemTotal:  9 kB\n")
    assert memory.available_bytes(CPU) is None
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "missing")
    assert memory.available_bytes(CPU) is None


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        (("0-1", "0-1", "2-3", "2-3"), None, 2),
        (("0", "1", "2", "3"), "max 100000", 4),
        (("0", "1", "2", "3"), "150000 100000", 2),
        (("0", "1", "2", "3"), "20000 100000", 1),
        (("0,2", "1,3", "0,2", "1,3"), "800000 100000", 2),
    ],
)
def test_cores_that_may_be_used(
    siblings: tuple[str, ...],
    quota: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against more threads than cores, which wait for one another: in a container, and where
    a core shows as two."""
    for cpu, own in enumerate(siblings):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{own}\n")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    monkeypatch.setattr(cores, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert cores.usable_cores() == expected


def test_a_loaded_model_uses_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the default: what was asked for counts, and nothing raises OMP_NUM_THREADS."""
    monkeypatch.setattr(loading, "usable_cores", lambda: 2)
    found = []
    for before, asked in ((8, None), (1, None), (1, 3)):
        torch.set_num_threads(before)
        loading.load_model(threads=asked)
        found.append(torch.get_num_threads())
    torch.set_num_threads(1)
    assert found == [2, 1, 3]


def test_unknown_devices_have_no_figure() -> None:
    assert memory.available_bytes(torch.device("meta")) is None


@pytest.mark.gpu
def test_free_memory_of_a_gpu() -> None:
    found = memory.available_bytes(torch.device("cuda"))
    assert found is not None and found > 0
