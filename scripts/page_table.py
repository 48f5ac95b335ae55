"""A table that a script writes into a page, between two marks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_DOCS = Path(__file__).resolve().parents[1] / "docs"
_END = "<!-- end -->\n"


@dataclass(frozen=True)
class PageTable:
    """Table `name` of a page in docs, which `script` writes; make: its lines, without marks."""

    page_name: str
    name: str
    script: str
    make: Callable[[], str]

    @property
    def page(self) -> str:
        """What the page says."""
        return (_DOCS / self.page_name).read_text(encoding="utf-8")

    def filled(self) -> str:
        """The page with today's table."""
        begin = f"<!-- table: {self.name} (scripts/{self.script}) -->\n"
        before, mark, rest = self.page.partition(begin)
        _, end, rest = rest.partition(_END)
        if not mark or not end:
            raise ValueError(f"{self.page_name}: has no place for the table {self.name}")
        return before + begin + self.make() + _END + rest

    def write(self) -> None:
        """Write it."""
        (_DOCS / self.page_name).write_text(self.filled(), encoding="utf-8")
