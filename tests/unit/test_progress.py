"""The bar of loading: gone for good once the model is there."""

import io
import sys
from pathlib import Path

import pytest

from tiny_models import tiny_config
from twotower import TwoTower
from twotower.checkpoint import save_backbone
from twotower.cli import progress
from twotower.loading import Placement
from twotower.model.initialise import randomise
from twotower.native import library

try:
    library.library()
except OSError as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_values_that_are_read_again_draw_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: a bar of a load that is over stays below everything that adapt says, since it
    reads a packed model's head again."""
    model = TwoTower(tiny_config(), towers="context")
    randomise(model, 1)
    save_backbone(model, tmp_path / "model")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 0.0)
    placement = Placement(model=str(tmp_path / "model"), device="cpu", quantization="int8")
    loaded = progress.load_with_bar(placement, "ar").model
    drawn = terminal.getvalue()
    assert "loading" in drawn
    assert loaded.unread and len(dict(loaded.values())) == len(loaded.state_dict())
    assert terminal.getvalue() == drawn
