"""The page of figures and the marked blocks: made from records, each of which names its machine."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("num2words")
pytest.importorskip("jsonschema")

from twotower.cli.machine import _command, recorded

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_figures

    return make_figures


@pytest.fixture
def results(figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the records, to be spoiled."""
    copy = tmp_path / "results"
    shutil.copytree(figures.RESULTS, copy)
    monkeypatch.setattr(figures, "RESULTS", copy)
    return copy


def change(file: Path, **fields: object) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | fields))


def make_record(figures: ModuleType, name: str, processor: str, date: str) -> object:
    about = {"processor": processor, "date": date, "command": "c"}
    return figures.Record(Path(name), "race", about, {})


def test_pages_are_what_the_script_writes(figures: ModuleType) -> None:
    """Guards against figures that stay behind their records, or are changed by hand.

    If this fails: python scripts/make_figures.py
    """
    for page, text in figures.outputs().items():
        assert page.read_text(encoding="utf-8") == text, page.name


@pytest.mark.parametrize("name", ["README.md", "src/twotower/assets/MODEL_CARD.md"])
def test_front_pages_have_their_quality_from_the_record(figures: ModuleType, name: str) -> None:
    """Guards against two pages with two values, each of them typed."""
    assert "<!-- figures: quality" in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("field", ["processor", "date", "command"])
def test_a_record_without_its_machine_is_refused(
    figures: ModuleType, results: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against figures of unlike machines that stand side by side as one."""
    about = {"processor": "p", "date": "d", "command": "c"} | {field: ""}
    change(results / "grammar_costs.json", recorded=about)
    assert figures.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: grammar_costs.json: recorded must name {field};")


def test_a_record_without_any_head_is_refused(figures: ModuleType, results: Path) -> None:
    (results / "ablations" / "train-zebra.json").write_text('{"name": "zebra"}')
    with pytest.raises(ValueError, match=r"^train-zebra.json: recorded must name processor, date"):
        figures.read_records()


def test_a_record_of_no_section_is_refused(figures: ModuleType, results: Path) -> None:
    """Guards against a measurement that nobody ever sees."""
    shutil.copy(results / "grammar_costs.json", results / "zebra_cpu_2026-11-30.json")
    with pytest.raises(ValueError, match=r"^zebra_cpu_2026-11-30.json: no section shows it"):
        figures.make_page(figures.read_records())


def test_the_newest_record_of_each_processor_is_shown(figures: ModuleType) -> None:
    """Guards against an old engine's figures above those of today's, or one machine that hides
    the other.
    """
    records = [
        make_record(figures, "a", "old", "2026-01-02"),
        make_record(figures, "b", "old", "2026-01-01"),
        make_record(figures, "c", "new", "2026-01-03"),
    ]
    kept, rest = figures.newest(records, "race")
    assert [one.file.name for one in kept] == ["c", "a"]
    assert [one.file.name for one in rest] == ["b"]


def test_blocks(figures: ModuleType) -> None:
    """Guards against a block that eats the text around it, or loses its machine or its link."""
    records = figures.read_records()
    text = "before\n<!-- figures: quality-line -->\nold\n<!-- end figures -->\nafter"
    filled = figures.fill_blocks(text, figures.CARD, records)
    assert filled.startswith("before\n<!-- figures: quality-line -->\n\nDiffusion keeps ")
    assert filled.endswith("\n\n<!-- end figures -->\nafter")
    newest = figures.newest(records, "evaluate")[0][0]
    assert newest.recorded["processor"] in filled
    assert "docs/figures.md of the source, quality-by-category" in filled
    assert figures.fill_blocks(filled, figures.CARD, records) == filled
    here = figures.fill_blocks(text, ROOT / "README.md", records)
    assert "(docs/figures.md#quality-by-category)" in here
    with pytest.raises(ValueError, match=r"README.md: figures: 'zebra' is unknown; use quality,"):
        figures.fill_blocks(text.replace("quality-line", "zebra"), ROOT / "README.md", records)


def test_a_block_that_never_ends_is_refused(figures: ModuleType) -> None:
    """Guards against a block that is left as it is for want of its end."""
    with pytest.raises(ValueError, match=r"README.md: 1 blocks of figures begin, 0 end"):
        figures.fill_blocks("<!-- figures: quality -->\nold", ROOT / "README.md", [])


def test_the_head_of_a_new_record() -> None:
    """Guards against two generations of one maker under one name, and paths of one machine."""
    assert all(recorded().values())
    assert _command(["/usr/bin/python3", "benchmarks/rows.py", "-n", "a b"]) == (
        "python benchmarks/rows.py -n 'a b'"
    )
    assert _command(["python", "/venv/bin/twotower", "bench"]) == "twotower bench"
    assert _command(["python", "-m", "benchmarks.x"]) == "python -m benchmarks.x"
