"""Links in the documentation lead somewhere, and the map tells of every source folder."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "twotower"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *PACKAGE.glob("assets/**/*.md")])


def without_code(text: str) -> str:
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings: lower case, spaces to dashes, other signs dropped."""
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def dead_links(text: str, page: Path) -> list[str]:
    """Relative link targets of `text` (at the path `page`) that name no file or no heading."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue  # a web address: tests have no network
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        if path.exists() and not anchor:
            continue
        if not path.exists() or anchor not in anchors(path.read_text("utf-8") if name else text):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page.read_text(encoding="utf-8"), page) == []


def test_a_dead_link_is_found() -> None:
    text = "# Head\n[a](gone.md) [b](#no-such) [c](#head) [d](README.md) `[e](code.md)`"
    assert dead_links(text, ROOT / "README.md") == ["gone.md", "#no-such"]


def python_blocks(text: str) -> list[str]:
    """Its Python that stands on its own: blocks which begin with an import of ours."""
    return re.findall(r"^```python\n(import twotower\n.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["engine.md", "speculation.md", "training.md"])
def test_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against first lines of a page that end in a TypeError."""
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks((ROOT / "docs" / name).read_text(encoding="utf-8"))
    exec(compile(block, name, "exec"), {})


def test_the_map_has_every_source_folder() -> None:
    """Guards against a map that keeps a folder that has gone or misses one that has come."""
    section = (ROOT / "docs/architecture.md").read_text("utf-8").split("## Map of the source")[1]
    block = section.split("```")[1]
    told = set(re.findall(r"^  (\w+)/", block, flags=re.MULTILINE))
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"assets"}
    assert told == there
