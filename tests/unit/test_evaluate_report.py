"""The report: whole without the network, honest about what is missing, safe for any text."""

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from twotower.lab.evaluate.report import (
    CAPTIONS,
    figures,
    headline,
    kind_of,
    to_html,
    write_examples,
    write_report,
)


def row(accuracy: float, retention: float | None, nfe: int) -> dict[str, object]:
    kept = None if retention is None else round(retention, 3)
    return {
        "accuracy": accuracy,
        "interval": [accuracy - 0.05, accuracy + 0.05],
        "retention": kept,
        "retention_interval": [None, None] if kept is None else [kept - 0.04, kept + 0.02],
        "n": 200,
        "nfe": nfe,
        "same_as_ar": 180,
        "tokens_per_forward": 9.5,
        "tokens_per_nfe": 5.25 if nfe else None,
        "tokens_per_s": 500.0,
        "speed_ratio": 2.5 if nfe else 1.0,
        "degenerate": 3,
    }


@pytest.fixture
def results() -> dict[str, object]:
    both = {"ar": row(0.9, 1.0, 0), "diffusion": row(0.88, 0.978, 100)}
    output = {
        "text": "<script>alert(1)</script>",
        "correct": False,
        "reason": "wrong value",
        "nfe": 3,
    }
    right = {**output, "text": "fine", "correct": True, "reason": ""}
    item = {"category": "math", "index": 0, "prompt": "1 < 2 & 3", "reference": "yes"}
    return {
        "model": {"path": "my <model>"},
        "seed": 0,
        "options": {"ar": {}},
        "versions": {"torch": "2"},
        "modes": both,
        "categories": {"math": both, "code": both},
        "items": [
            {**item, "outputs": {"ar": right, "diffusion": right}, "prompt": "all right"},
            {**item, "outputs": {"ar": right, "diffusion": output}},
        ],
        "sweep": [
            {"confidence_threshold": t, "steps_per_block": s, "accuracy": 0.5 + t / 3, "n": 50,
             "tokens_per_nfe": 8 - 5 * t, "speed_ratio": 3 - t}
            for t, s in ((0.5, None), (0.9, None), (0.9, 2), (0.9, 4))
        ],
        "traces": {
            "diffusion": {
                "steps_by_block": [4.0, 2.5],
                "blocks": [10, 6],
                "commit_step_by_position": [1.0, 1.5, 2.0],
                "kendall_tau": 0.9,
            }
        },
    }  # fmt: skip


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else(results: dict[str, object], tmp_path: Path) -> None:
    write_report(results, tmp_path / "new")
    files = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert set(files) == {"retention.png", "tradeoff.png", "steps_by_block.png",
                          "commit_order.png", "report.html", "results.json"}  # fmt: skip
    pictures = [file for name, file in files.items() if name.endswith(".png")]
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in pictures)
    page = Text()
    page.feed(files["report.html"].read_text())
    assert len(page.sources) == 4 and all(s.startswith("data:image/png") for s in page.sources)
    assert page.tags.count("table") == 4 and "script" not in page.tags


def test_figures_and_examples_are_in_the_page(results: dict[str, object]) -> None:
    page = to_html(results, {})
    assert "keeps 97.8 % of the AR quality (95 %: 93.8-99.8) at 2.50 times" in page
    assert "5.25 tokens/NFE" in headline(results)
    assert "1 &lt; 2 &amp; 3" in page and "&lt;script&gt;" in page  # what a model writes is text
    assert page.index("1 &lt; 2") < page.index("all right")  # wrong ones first
    assert re.search(r"<td>88.0</td><td>83.0-93.0</td><td>97.8</td>", page)


def test_missing_parts_are_left_out(results: dict[str, object]) -> None:
    """Silent failure: an empty axis that looks like a measurement of nothing."""
    poor = {**results, "sweep": [], "traces": {}, "modes": {"diffusion": row(0.5, None, 9)}}
    poor["categories"] = {"math": poor["modes"]}
    poor.pop("items")
    assert figures(poor) == {}
    page = to_html(poor, {})
    assert "No sweep was run" in page and "no retention" in page and "Examples" not in page


def test_why_nothing_is_kept_is_said() -> None:
    """Guards "no mode was compared with ar" of modes that were: ar had no right answer."""
    wrong = row(0.0, None, 9)
    assert headline({"modes": {"ar": wrong}}).startswith("No mode was compared with ar, so")
    assert headline({"modes": {"ar": wrong, "diffusion": wrong}}).startswith("No answer of ar is")


def test_a_speed_that_was_not_measured_is_not_said() -> None:
    """Guards "at 0.00 times its speed", of an evaluation of one prompt."""
    unknown = {**row(0.5, 1.0, 9), "speed_ratio": None}
    assert "times" not in headline({"modes": {"ar": unknown, "diffusion": unknown}})


def test_pictures_say_how_many_items(results: dict[str, object]) -> None:
    drawn = figures(results)
    assert drawn["retention"].axes[0].get_title() == "Quality kept, 200 items a category"
    assert "50 items" in drawn["tradeoff"].get_suptitle()


def test_quality_is_drawn_against_passes_and_against_speed(results: dict[str, object]) -> None:
    """Silent failure: under the title of speed the picture shows only passes."""
    passes, speed = figures(results)["tradeoff"].axes
    assert "tokens/NFE" in passes.get_xlabel() and "times that of ar" in speed.get_xlabel()
    assert list(passes.lines[0].get_xdata()) == [5.5, 3.5]
    assert list(speed.lines[0].get_xdata()) == [2.5, 2.1]
    untimed = [{**point, "speed_ratio": None} for point in results["sweep"]]
    assert len(figures({**results, "sweep": untimed})["tradeoff"].axes) == 1


def test_settings_that_give_the_same_share_a_label(results: dict[str, object]) -> None:
    """Silent failure: a limit that changes nothing is printed over another one, unreadably."""
    same = [{**p, "tokens_per_nfe": 4.0, "accuracy": 0.75} for p in results["sweep"][2:]]
    axes = figures({**results, "sweep": [*results["sweep"][:2], *same]})["tradeoff"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.5", "0.9", "2, 4"]


def test_every_picture_is_explained(results: dict[str, object]) -> None:
    """Silent failure: a picture under the name of its file, which no reader understands."""
    assert list(CAPTIONS) == list(figures(results))
    page = to_html(results, dict.fromkeys(CAPTIONS, b""))
    for title, explanation in CAPTIONS.values():
        assert f"<h2>{title}</h2>" in page and page.index(escape(explanation)) > page.index(title)


def test_items_on_which_modes_disagree_come_first(results: dict[str, object]) -> None:
    """Silent failure: the few telling items drown among hundreds that are right."""
    right, split = results["items"]
    wrong = {**split, "index": 7, "outputs": {"ar": split["outputs"]["diffusion"]}}
    assert [kind_of(item) for item in (right, split, wrong)] == [
        "right in every mode", "modes disagree", "wrong in every mode",
    ]  # fmt: skip
    many = [{**split, "index": n} for n in range(15)]
    page = "".join(write_examples([right, wrong, *many]))
    places = [
        page.index(f"math: {kind}: {n} of 17 items")
        for kind, n in (
            ("modes disagree", 15),
            ("wrong in every mode", 1),
            ("right in every mode", 1),
        )
    ]
    assert places == sorted(places) and "15 of 17 items, first 12 shown" in page
    assert "math 11" in page and "math 12<" not in page and page.count("<details>") == 3
    assert "wrong: wrong value, 3 NFE" in page


def test_a_cut_run_says_so(results: dict[str, object]) -> None:
    assert "Interrupted" not in to_html({**results, "complete": True}, {})
    assert "Interrupted" in to_html({**results, "complete": False}, {})
