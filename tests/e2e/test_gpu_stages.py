"""The stages for a GPU, rehearsed: the same code on a CPU, with tiny sizes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts import script
from twotower.lab.plan import PlanOptions, make_plan

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "gpu"))
passes, picture = script("passes"), script("picture")


def rehearse(stage: str, out: Path, *options: str) -> dict[str, Any]:
    """The record that a stage leaves; beside it is a picture, or a line says why there is none."""
    command = [sys.executable, str(ROOT / "scripts" / "gpu" / f"{stage}.py"), "--rehearse"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out), *options],
        env=environment, cwd=out.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(out.read_text())
    if found["results"]:
        has_picture = out.with_suffix(".png").is_file()
        assert has_picture == (find_spec("matplotlib") is not None)
        assert has_picture == ("no picture is drawn" not in done.stdout)
    return found


def test_conformance(tmp_path: Path) -> None:
    found = rehearse("conformance", tmp_path / "found.json")["results"]
    assert len(found) == 3 + 5 * 2 * 2
    assert all(one["is_right"] for one in found)


def test_kernels(tmp_path: Path) -> None:
    """Without triton PyTorch's functions alone, which is told."""
    record = rehearse("kernels", tmp_path / "found.json")
    found = {one["kernel"]: one for one in record["results"]}
    assert set(found) == {"residual and norm", "gated norm", "convolution and scan",
                          "int8 product", "int8 experts"}  # fmt: skip
    has_fused = record["without_fused_kernels"] is None
    assert all(one["is_right"] and ("fused" in one["us"]) == has_fused for one in found.values())


def test_passes_and_what_follows_from_them(tmp_path: Path) -> None:
    """Guards the quarter of an hour: a run that was cut short goes on and repeats nothing."""
    out, sizes = tmp_path / "found.json", ("--size", "dense-1b", "nano-30b, int8")
    first = rehearse("passes", out, *sizes, "--variant", "graphs")
    both = rehearse("passes", out, *sizes, "--variant", "graphs", "eager")
    assert both["results"][:4] == first["results"] and len(both["results"]) == 6
    for one in both["results"]:
        assert set(one["ms"]) == {"ar_step", "denoise", "extend", "verify"}
        for planned in one["predicted_ms"].values():
            assert set(planned) == set(one["ms"])
    assert len(both["conclusions"]) == 6
    for variant in ("graphs", "eager"):
        file = str(tmp_path / f"found-{variant}.toml")
        plan = make_plan(PlanOptions(hardware="h200", efficiency=file))
        assert plan["passes"]


def test_compiled_passes_are_traced(tmp_path: Path) -> None:
    options = ("--size", "dense-1b", "--variant", "graphs, compiled")
    found = rehearse("passes", tmp_path / "found.json", *options)["results"]
    assert [("ms" in one, one["rows"]) for one in found] == [(True, 1), (True, 4)]


def test_a_stage_stops_in_time(tmp_path: Path) -> None:
    found = rehearse("passes", tmp_path / "found.json", "--seconds", "0")
    assert found["results"] == found["conclusions"] == []


def test_suite(tmp_path: Path) -> None:
    found = rehearse("suite", tmp_path / "found.json")["results"]
    assert len(found) == 6 * 2 * 2 + 2 * 2  # ar and speculative in int8
    assert all(one["equal_to_cpu"] == one["prompts"] for one in found)


def test_adapt_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = ("--work", str(tmp_path / "work"), "--batch-size", "8", "--answers-per-step", "4",
               "--blocks-per-answer", "4", "--minutes")  # fmt: skip
    first = rehearse("adapt", tmp_path / "found.json", *options, "0.04")
    later = rehearse("adapt", tmp_path / "found.json", *options, "0.08")
    assert [one["part"] for one in later["results"]] == ["answers", "train", "train"]
    assert later["curve"][-1]["steps"] > first["curve"][-1]["steps"] > 0
    denoiser = tmp_path / "work" / "denoiser"
    pieces = b"".join((denoiser / name).read_bytes() for name in later["pieces"])
    assert pieces == (denoiser / "model.safetensors").read_bytes()


def test_a_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu" / "suite.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("sees no CUDA device; use --rehearse for a CPU\n")


def test_a_picture_is_renewed_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the time of a stage, which drawing must not take, and a stage without matplotlib."""
    file, now = tmp_path / "found.png", [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    result = {"size": "shipped", "variant": "eager", "predicted_ms": {"limit": {"extend": 1.0}}}
    record = {"results": [result | {"ms": {"extend": {"median": 2.0}}}],
              "machine": {"gpu": "none", "torch": "2"}}  # fmt: skip
    pytest.importorskip("matplotlib")
    pictures = picture.Picture(file, passes.paint)
    pictures.renew(record)
    assert not file.exists()
    now[0] += picture.RENEWED_EVERY_S + 1
    pictures.renew(record | {"results": []})
    assert not file.exists()
    pictures.renew(record)
    assert file.read_bytes().startswith(b"\x89PNG")
    file.unlink()
    pictures.renew(record)
    assert not file.exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for _ in range(2):
        pictures.renew(record, is_forced=True)
    assert capsys.readouterr().out.count("no picture is drawn: matplotlib is not installed") == 1


def test_speed_up_by_hand() -> None:
    """Two passes of 4 ms and an extension of 2 ms for 8 tokens, which are 8 steps of 2 ms."""
    ms = {"ar_step": 2.0, "denoise": 4.0, "extend": 2.0, "verify": 3.0}
    assert passes.speed_up(ms, 8, 4.0) == 1.6
    assert passes.cycle_steps(ms) == 3.5
    result = {"size": "a", "variant": "b", "rows": 1, "block_size": 8}
    timed = result | {"ms": {name: {"median": value} for name, value in ms.items()}}
    (found,) = passes.conclusions([timed, result | {"failed": "no memory"}])
    tokens = passes.PUBLISHED_TOKENS_PER_NFE[0]
    expected = pytest.approx(16 / (8 / tokens * 4 + 2), abs=1e-3)
    assert found["speed_up_over_ar"][f"{tokens} tokens/NFE"] == expected


def test_full_size_is_the_released_one() -> None:
    config = passes.config_of("nano-30b", is_rehearsal=False)
    assert (config.context.num_layers, config.hidden_size) == (52, 2688)
