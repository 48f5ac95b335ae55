"""The scripts of the repository as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = str(Path(__file__).parents[1] / "scripts")


def script(name: str) -> Any:
    """The module scripts/{name}.py; untyped, for its contents are the test's business."""
    if _FOLDER not in sys.path:
        sys.path.append(_FOLDER)
    found: ModuleType = importlib.import_module(name)
    return found
