"""What help shows is what may be typed, and what stands in the docs of the options."""

import dataclasses
import importlib
import re
from typing import get_type_hints

import pytest

from twotower.cli.main import VERBS, main
from twotower.cli.parse import parse
from twotower.engine import ResolvedOptions
from twotower.train.options import TrainOptions


def test_generate_has_a_flag_with_the_default_of_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a second copy of a default that drifts from the library's."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["generate", "-h"]) == 0
    helps = _help_of_flags(capsys.readouterr().out)
    for field in dataclasses.fields(ResolvedOptions):
        is_repeatable = field.name in ("stop", "logit_bias", "eos_token_id")
        shown = "(repeatable)" if is_repeatable else f"(default: {field.default})"
        shown = "" if field.default in (None, False) else shown  # nothing, or a switch
        assert shown in helps[f"--{field.name.replace('_', '-')}"]


def _help_of_flags(out: str) -> dict[str, str]:
    """What help says of each long flag."""
    helps: dict[str, str] = {}
    for entry in re.split(r"\n[\u2502 ] (?=--?\w)", out):
        flags, *_ = re.split(r"\s{2,}|\n", entry)
        text = " ".join(entry.replace("\u2502", " ").split())
        helps |= dict.fromkeys(re.findall(r"--[\w-]+", flags), text)
    return helps


REQUIRED = {  # the least that a verb takes
    "inspect": ["shipped"],
    "convert": ["shipped", "folder"],
    "train": ["--recipe", "backbone"],
    "adapt": ["--model", "shipped", "--prompts", "file", "--output", "folder"],
}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "lm-eval"])
def test_a_default_that_help_shows_can_be_typed(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: help has "(default: none)" for a number, and that word is refused, or is the
    name of a file.
    """
    monkeypatch.setenv("COLUMNS", "100")
    assert main([verb, "-h"]) == 0
    helps = _help_of_flags(capsys.readouterr().out)
    shown = {f: d[1] for f, text in helps.items() if (d := re.search(r"\(default: (.+?)\)", text))}
    assert shown or verb == "inspect"
    module = importlib.import_module(f"twotower.cli.{verb}")
    options_class: type = get_type_hints(module.run)["options"]
    least = REQUIRED.get(verb, [])
    typed = least
    for flag, default in shown.items():
        words = default.replace(", ", ",").split()  # which two lines of help part
        if flag != "--mode":  # in which some of the others have no effect
            typed = [*typed, *words] if default.startswith("--") else [*typed, flag, *words]
    for arguments in (typed, [*least, "--mode", shown["--mode"]] if "--mode" in shown else least):
        found = _with_defaults(parse(options_class, verb, arguments))
        assert found == _with_defaults(parse(options_class, verb, least))


def test_values_are_shown_as_they_are_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `--reads {None}|{[INT [INT ...]]}` and `--betas FLOAT`, which takes two numbers; and a
    list whose second flag takes the place of the first."""
    monkeypatch.setenv("COLUMNS", "100")
    for verb in VERBS:
        assert verb == "lm-eval" or main([verb, "-h"]) == 0
    out = capsys.readouterr().out
    assert "{None" not in out
    assert "--reads INT [INT ...] " in out and "--betas FLOAT FLOAT " in out
    given = ["--recipe", "denoiser", "--init", "x", "--reads", "0", "9", "--reads", "11"]
    assert parse(TrainOptions, "train", given).reads == (0, 9, 11)


def _with_defaults(options: object) -> dict[str, object]:
    """A verb's options by name, with those of decoding that were not given."""
    defaults = {field.name: field.default for field in dataclasses.fields(ResolvedOptions)}
    return {
        name: defaults | value if isinstance(value, dict) else value
        for name, value in vars(options).items()
    }
