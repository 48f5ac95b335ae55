"""The public calls, given what they cannot take: one line, and the names that Tab completes."""

import ast
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

import twotower
from tiny_models import tiny_model
from tiny_text import byte_tokenizer
from twotower.adapt.options import AnswerOptions, ThinOptions
from twotower.arguments import check_fields, number
from twotower.checkpoint import describe, export_gguf
from twotower.cli.evaluate import EvaluateOptions
from twotower.families import read_config
from twotower.lab.bench.run import MeasureOptions
from twotower.paths import usable_path
from twotower.serve.options import ServeOptions
from twotower.train.options import TrainOptions
from twotower.train.prepare import PrepareOptions

MODEL, TOKENIZER = tiny_model(), byte_tokenizer()
DENSE = tiny_model(hybrid_override_pattern="M*-")
RUN = TrainOptions(recipe="backbone")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: twotower.load_model(5),
            "model=5 is not of type str or Path; pass a path or hub id",
        ),
        (lambda: twotower.load_model(MODEL), r"model=TwoTower\(.*\) is not of type str or Path"),
        (
            lambda: twotower.load_model(denoiser=MODEL),
            r"denoiser=TwoTower\(.* is not of type str or Path",
        ),
        (lambda: twotower.load_model(device=5), "device=5 is not of type str or device"),
        (lambda: twotower.load_model(""), "model='' must be text that is not empty"),
        (lambda: twotower.Placement(model=5), "model=5 must be text that is not empty"),
        (
            lambda: twotower.GenerateOptions(mode=MODEL),
            r"mode=TwoTower\(.*\) is unknown; use one of",
        ),
        (lambda: twotower.generate(MODEL, MODEL), "prompts=TwoTower.* must be a list of prompts"),
        (
            lambda: twotower.save_model(MODEL, "a", dtype="float32"),
            "dtype='float32' is not of type dtype; pass torch.bfloat16",
        ),
        (lambda: twotower.load_tokenizer(5), "model=5 is not of type str or Path"),
        (
            lambda: twotower.save_model("x", "a"),
            "model='x' is not of type TwoTower; pass twotower.l",
        ),
        (lambda: twotower.save_model(MODEL, 5), "folder=5 is not of type str or Path; pass a path"),
        (lambda: twotower.save_model(MODEL, "a", "b"), "tokenizer='b' is not of type Tokenizer"),
        (lambda: twotower.accelerate("x"), "model='x' is not of type TwoTower"),
        (
            lambda: twotower.generate(MODEL, [[1]], engine=5),
            "engine=5 is not of type EngineOptions",
        ),
        (
            lambda: twotower.generate(MODEL, [[1]], None, "x"),
            "tokenizer='x' is not of type Tokenizer",
        ),
        (
            lambda: twotower.score_texts(MODEL, ["a"], [[1]]),
            "prompts='a' is not of type list or tuple",
        ),
        (
            lambda: twotower.score_texts(MODEL, [[1]], [[1], [2]]),
            "texts: 2 given for 1 prompts; give one for each",
        ),
        (lambda: twotower.score_texts(MODEL, [[1]], [[99]]), "text 0 has token 99 outside the vo"),
        (lambda: twotower.score_texts("x", [[1]], [[1]]), "model='x' is not of type TwoTower"),
        (lambda: twotower.train_model(5), "options=5 is not of type TrainOptions"),
        (lambda: twotower.prepare_data(5), "options=5 is not of type PrepareOptions"),
        (lambda: TOKENIZER.encode(5), "text=5 is not of type str; pass a string"),
        (lambda: TOKENIZER.decode("abc"), "ids='abc' must be a list of token ids"),
        (lambda: TOKENIZER.decode(5), "ids=5 must be a list of token ids"),  # type: ignore[arg-type]
        (lambda: TOKENIZER.decode([1.5]), r"ids=\[1.5\] must be a list"),  # type: ignore[list-item]
        (lambda: twotower.Tokenizer("x"), "backend='x' is not of type Tokenizer"),
        (lambda: twotower.TwoTower("x"), "config='x' is not of type TwoTowerConfig"),
        (lambda: twotower.TwoTower(MODEL.config, "x"), "towers='x' is unknown; use one of both, c"),
        (lambda: MODEL.config.replace(context=3), "context=3 is not of type TowerConfig"),
        (lambda: next(twotower.train_steps(RUN, 3)), "processes=3 is not of type Processes"),
        (lambda: MODEL.prefill([1, 2]), r"ids=\[1, 2\] is not of type Tensor"),
        (lambda: MODEL.prefill(torch.ones(1, 2)), "must be .rows, tokens >= 1. int64"),
    ],
)
def test_an_argument_of_a_wrong_type_is_one_line(call: Callable[[], object], said: str) -> None:
    """Silent failure: an AttributeError from ten calls below, which names nothing of the caller."""
    with pytest.raises(ValueError, match=f"^{said}" if "must" not in said else said) as found:
        call()
    assert "\n" not in str(found.value)


LONG = "x" * 300


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (LONG, "File name too long"),
        (f"{LONG}.gguf", "File name too long"),
        ("a/" * 3000, "File name too long"),
        ("a\0b", "embedded null byte"),
        ("\ud800", "surrogates not allowed"),
    ],
)
@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("model", twotower.load_model),
        ("model", lambda path: twotower.Placement(model=path, revision="main")),
        ("denoiser", lambda path: twotower.load_model(denoiser=path)),
        ("tokenizer", twotower.load_tokenizer),
        ("folder", lambda path: twotower.save_model(MODEL, path)),
        ("folder", TOKENIZER.save),
        ("path", lambda path: export_gguf(DENSE, path)),
        ("path", read_config),
        ("model", describe),
        ("output", lambda path: PrepareOptions(output=Path(path))),
        ("data", lambda path: TrainOptions(recipe="backbone", data=Path(path))),
    ],
)
def test_a_path_that_no_system_takes_is_one_line(
    field: str, call: Callable[[str], object], path: str, reason: str
) -> None:
    """Silent failure: an OSError from the depth of pathlib, which names no argument."""
    with pytest.raises(ValueError, match=rf"^{field}='.* cannot be used \(.*{reason}.*\)") as found:
        call(path)
    assert type(found.value) is ValueError
    assert "\n" not in str(found.value) and len(str(found.value)) < 250


def test_a_folder_that_may_not_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a PermissionError later, of a file whose name nobody gave. Root may read all,
    so that the system's answer is made up."""
    assert usable_path("model", tmp_path) == tmp_path
    assert usable_path("model", "nothing/here") == Path("nothing/here")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    with pytest.raises(ValueError, match=r"^model='.*' cannot be used \(Permission denied\)"):
        twotower.load_model(tmp_path)


def test_tab_completes_the_public_names_alone() -> None:
    names = [name for name in dir(twotower) if not name.startswith("_")]
    assert names == sorted(set(twotower.__all__))


def test_every_event_is_public() -> None:
    """Guards a `match` over the events, one of which could not be named."""
    assert {event.__name__ for event in get_args(twotower.Event)} <= {*twotower.__all__}


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0, {"low": 1}, "x=0 must be at least 1"),
        (9, {"low": 1, "high": 8}, "x=9 must be between 1 and 8"),
        (0.0, {"low": 0, "high": 1, "is_above": True}, "x=0.0 must be above 0 and at most 1"),
        (0.0, {"low": 0, "is_above": True}, "x=0.0 must be a finite number above 0"),
        (float("inf"), {"low": 0}, "x=inf must be a finite number, at least 0"),
        (float("nan"), {"low": 0, "high": 1}, "x=nan must be between 0 and 1"),
        (-(10**400), {"low": 0, "high": 9}, "must be between 0 and 9"),
        (10**400, {"low": 0}, "must be a finite number, at least 0"),
        (2**63, {"low": 0, "is_whole": True}, f"x={2**63} must be at most {2**63 - 1}"),
        (True, {"low": 0}, "x=True must be a number"),
        (1.5, {"low": 0, "is_whole": True}, "x=1.5 must be a whole number"),
        (1.0, {"low": 0, "high": 1, "is_below": True}, "x=1.0 must be at least 0 and below 1"),
        (None, {"low": 0}, "x=None must be a number"),
    ],
)
def test_a_number_out_of_range_is_one_line(
    value: float, bounds: dict[str, float], said: str
) -> None:
    """Silent failure: numbers that no tensor holds pass, and end a request as an internal error."""
    with pytest.raises(ValueError) as found:
        check_fields(SimpleNamespace(x=value), {"x": number(**bounds)})
    assert str(found.value).endswith(said) and len(str(found.value)) < 150


@dataclass(kw_only=True)
class Numbers:
    a: object = 0
    b: object = 0.0
    c: object = None


def test_a_number_in_range_passes() -> None:
    check_fields(Numbers(a=1, b=8.0), dict.fromkeys("abc", number(1, 8)))


def test_none_is_taken_where_it_is_the_default_alone() -> None:
    """Silent failure: None for a field that needs a value fails as a TypeError inside."""
    with pytest.raises(ValueError, match="a=None must be a number"):
        check_fields(Numbers(a=None), {"a": number(1)})


@pytest.mark.parametrize(
    ("options_class", "values", "said"),
    [
        (AnswerOptions, {"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        (ThinOptions, {"block_size": 1}, "block_size=1 must be between 2 and 64"),
        (EvaluateOptions, {"items": 2.5}, "items=2.5 must be a whole number"),
        (MeasureOptions, {"items": 2.5}, "items=2.5 must be a whole number"),
        (ServeOptions, {"port": 80.5}, "port=80.5 must be a whole number"),
        (TrainOptions, {"recipe": "backbone", "betas": (0.9,)}, "betas=(0.9,) must be a list of 2"),
        (PrepareOptions, {"vocab_size": 9}, "vocab_size=9 must be at least 260"),
        (PrepareOptions, {"columns": "a"}, "columns='a' must be a list of values"),
        (PrepareOptions, {"columns": [3]}, "columns=(3,) must be text"),
    ],
)
def test_options_of_every_room_say_what_a_value_must_be(
    options_class: type, values: dict[str, object], said: str
) -> None:
    """Silent failure: half a row or half an item is cut or rounded somewhere inside."""
    with pytest.raises(ValueError) as found:
        options_class(**values)
    assert str(found.value) == said


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: PrepareOptions(out="x"),
            "out: PrepareOptions has no such field, perhaps output; see help(PrepareOptions)",
        ),
        (
            lambda: twotower.GenerateOptions(max_tokens=3),
            "max_tokens: GenerateOptions has no such field, perhaps max_new_tokens; "
            "see help(GenerateOptions)",
        ),
        (
            lambda: twotower.EngineOptions(max_num_seqs=3),
            "max_num_seqs: EngineOptions has no such field; see help(EngineOptions)",
        ),
        (
            lambda: twotower.Placement("shipped"),
            "Placement: give its fields by name, as in model=...",
        ),
        (lambda: TrainOptions(), "recipe: missing; see help(TrainOptions)"),
    ],
)
def test_public_options_name_the_fields_that_they_want(
    call: Callable[[], object], said: str
) -> None:
    """Silent failure: the older name of a field ends in a TypeError, which does not name today's.
    Options of a verb, which are made from theirs, are not concerned.
    """
    with pytest.raises(ValueError) as found:
        call()
    assert str(found.value) == said


def test_a_message_of_the_library_names_no_flag() -> None:
    """Guards a caller in Python, who has fields and no flags: the command line makes the flag of a
    field's name. Whole commands may be named."""
    package = Path(twotower.__file__).parent
    rooms = {"cli", "serve", "lab", "adapt", "hosts"}  # for an operator, or a verb alone
    found = []
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] in rooms:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in docs]
        spelt = (text.value for text in texts if isinstance(text.value, str))
        found += [t for t in spelt if re.search(r"(?<![\w-])--[a-z]", t) and "twotower " not in t]
    assert not found
