"""The native library as it is made: no compiler, structs, the order of weights."""

import logging
import re
import shutil
from pathlib import Path

import pytest

from tiny_models import fresh_model, tiny_model
from twotower import accelerate
from twotower.native import layout, library
from twotower.native.backend import NativeBackend

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

DENSE = "M*-M*-"


def test_no_compiler_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards machines without a compiler, or with one that fails: they decode as before."""
    model = tiny_model(hybrid_override_pattern=DENSE)
    monkeypatch.setattr("twotower.native.tower.library", library.library.__wrapped__)
    monkeypatch.setattr(library, "library_file", library.library_file.__wrapped__)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    broken.chmod(0o755)
    for found, reason in ((None, "no C++ compiler"), (str(broken), "no such thing")):
        monkeypatch.setattr(library.shutil, "which", lambda name, found=found: found)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert accelerate(model) is model
        assert len(caplog.messages) == 1 and reason in caplog.messages[0]
        with pytest.raises(
            ValueError, match=rf"backend=native: .*{re.escape(reason)}.*; use backend=eager"
        ):
            accelerate(model, "native")


@pytest.mark.parametrize(
    ("right", "wrong", "missing"),
    [("int32_t q_heads", "int32_t heads_of_q", "q_heads"), ("float *step", "float *dt", "step")],
)
def test_a_struct_that_cpp_does_not_know_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str, missing: str
) -> None:
    """Guards addresses: a field that C++ and Python expect at different places is read as another
    one, and texts still flow."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None
    ours = layout._STRUCTS
    changed = {name: fields.replace(right, wrong) for name, fields in ours.items()}
    assert changed != ours
    monkeypatch.setattr(layout, "_STRUCTS", changed)
    with pytest.raises(OSError, match=rf"cannot compile engine.cpp: .*no member named .{missing}."):
        library.compile_library(compiler, tmp_path / "mutant.so", ("-O0",))


def test_weights_lie_in_the_declared_order() -> None:
    """Guards the one declaration: a struct of C++ has the released weights in Python's order."""
    header = layout.header()
    for kind, struct in (("M", "Mamba"), ("*", "Attention"), ("-", "MLP")):
        (found,) = re.findall(rf"struct {struct}Weights {{ Weight pre_norm, (.*); }};", header)
        names = layout.weight_names(ord(kind))
        assert names[0] == "norm.weight" and len(names) == 1 + len(found.split(", "))
        for name, member in zip(names[1:], found.split(", "), strict=True):
            assert name in (
                f"mixer.{member}.weight",
                f"mixer.{member}",
                f"mixer.{member[:-5]}.bias",
            )


def test_a_weight_that_the_model_lacks_is_one_line() -> None:
    """Guards a null address, which would end the process."""
    model = fresh_model(hybrid_override_pattern=DENSE)
    del model.context_tower.layers[0].mixer.dt_bias
    with pytest.raises(ValueError, match=r"needs the weight layers.0.mixer.dt_bias"):
        NativeBackend(model, "none")
