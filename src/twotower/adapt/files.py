"""Files of a run, written whole or not at all: a full disk loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """ValueError (one line) where the file cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file}: cannot be written ({reason}); what was done is kept: free some space and run "
            "the same command again"
        ) from None


@contextmanager
def reading(place: Path | str, remedy: str, what: str = "what") -> Iterator[None]:
    """ValueError (one line) for what adapt did not write so. what: "what", or "a ... that"."""
    try:
        yield
    except (
        OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError
    ):  # fmt: skip
        raise ValueError(f"{place}: is not {what} adapt wrote; {remedy}") from None


def write_whole(file: Path, text: str) -> None:
    """A text in one piece."""
    with _replacing(file) as aside:
        aside.write_text(text)


def save_whole(tensors: dict[str, Tensor], file: Path, told: dict[str, str] | None = None) -> None:
    """Tensors in one piece."""
    with _replacing(file) as aside:
        save_file(tensors, aside, told)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A file beside it, which takes its place at the end."""
    aside = file.with_suffix(".tmp")
    with writing(file):
        try:
            yield aside
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
