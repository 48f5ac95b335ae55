"""The documentation: links lead somewhere, its code runs, the map has every source folder."""

import ast
import importlib
import re
import shlex
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest

from twotower.cli.main import VERBS, main, train_arguments
from twotower.cli.parse import parse

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


class Block(NamedTuple):
    """A block of code; marked: a line `<!-- not run: reason -->` stands before it."""

    code: str
    is_marked: bool


def code_blocks(text: str, language: str) -> list[Block]:
    pattern = rf"(<!-- not run: .+ -->\n)?^```{language}\n(.*?)^```"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return [Block(code, bool(marker)) for marker, code in found]


def blocks_of_pages(language: str) -> list[Any]:
    """Each block of each page, as a test's parameter."""
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(code_blocks(page.read_text("utf-8"), language), 1)
    ]


@pytest.mark.parametrize("block", [b for b in blocks_of_pages("python") if not b.values[0][1]])
def test_python_of_the_pages_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against first lines of a page that end in a TypeError. Each block stands alone."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, "a page", "exec"), {"__name__": "page"})


def verb_lines(code: str) -> list[list[str]]:
    """The arguments of each `twotower` command in a shell block, also behind && and torchrun."""
    found, held = list[list[str]](), ""
    for line in code.replace("\\\n", " ").splitlines():
        held += line + "\n"
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # a quoted text goes on in the next line
            continue
        held = ""
        for _, group in groupby(words, key=lambda word: word == "&&"):
            command = list(group)
            if command[0] == "twotower" or command[0] == "torchrun":
                found.append(command[command.index("twotower") + 1 :])
    return found


def parse_verb(arguments: list[str]) -> None:
    """ValueError for flags and values that the verb does not have."""
    verb, *rest = arguments
    if verb == "lm-eval":  # lm-eval's own flags
        return
    module = importlib.import_module(f"twotower.cli.{verb}")
    rest = train_arguments(rest) if verb == "train" and "--options" not in rest else rest
    parse(get_type_hints(module.run)["options"], verb, rest)


def is_quick(arguments: list[str]) -> bool:
    """Whether a command needs no files, network or GPU and ends within two seconds."""
    named = {"-m", "--model", "--results", "--out", "--denoiser-device"} & {*arguments}
    return arguments[0] in ("generate", "plan") and not named


@pytest.mark.parametrize("block", blocks_of_pages("sh"))
def test_commands_of_the_pages(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against flags that have gone and values that are refused; quick commands are run."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "2 + 2 ="}\n')
    for arguments in verb_lines(block.code):
        parse_verb(arguments)
        if is_quick(arguments) and not block.is_marked:
            assert main(arguments) == 0, arguments


def test_a_stale_command_is_found() -> None:
    block = "pip install x && twotower generate 'a\nb' \\\n  --no-such 1  # it's\ntwotower plan"
    assert verb_lines(block) == [["generate", "a\nb", "--no-such", "1"], ["plan"]]
    with pytest.raises(ValueError, match="no-such"):
        parse_verb(verb_lines(block)[0])
    with pytest.raises(ValueError, match="dtype"):
        parse_verb(["generate", "--dtype", "half"])


def commands_in_messages() -> set[tuple[str, str]]:
    """Verbs and flags of the commands in the texts of the source."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for verb, rest in re.findall(r"twotower ([\w-]+)((?: +[^ ;:,.]+)*)", node.value):
                    flags = re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)
                    found |= {(verb, flag) for flag in flags if verb in VERBS}
    return found


def test_commands_in_messages_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a remedy with a flag that has another name by now."""
    found = commands_in_messages()
    assert ("convert", "--quantization") in found
    for verb in sorted({verb for verb, _ in found} - {"lm-eval"}):  # whose flags are another's
        assert main([verb, "-h"]) == 0
        known = capsys.readouterr().out
        assert [flag for name, flag in found if name == verb and flag not in known] == []


def test_marked_blocks_are_told_from_others() -> None:
    text = "<!-- not run: needs a server -->\n```python\na\n```\n\n```python\nb\n```\n"
    assert code_blocks(text, "python") == [Block("a\n", True), Block("b\n", False)]


def test_the_map_has_every_source_folder() -> None:
    """Guards against a map that keeps a folder that has gone or misses one that has come."""
    section = (ROOT / "docs/architecture.md").read_text("utf-8").split("## Map of the source")[1]
    block = section.split("```")[1]
    told = set(re.findall(r"^  (\w+)/", block, flags=re.MULTILINE))
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"assets"}
    assert told == there
