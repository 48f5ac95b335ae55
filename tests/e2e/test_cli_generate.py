"""`twotower generate`: where prompts come from, what is printed, and what is refused."""

import io
import json
import sys
from pathlib import Path

import pytest

import twotower
from tiny_checkpoint import make_checkpoint
from tiny_models import fresh_model
from twotower import loading
from twotower.checkpoint import export_gguf, files, load_checkpoint
from twotower.cli.main import main
from twotower.cli.prompts import read_grammar
from twotower.cli.text import printable

FEW = ["--max-new-tokens", "6", "--ignore-eos"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("cli") / "model"))


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    status = main(["generate", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    record: dict[str, object] = json.loads(out)
    return record


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("mode", ["diffusion", "posterior", "ar", "mock-ar"])
def test_json_holds_what_the_library_returns(
    mode: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a flag that does not reach the engine."""
    flags = ["--mode", mode, "--temperature", "0.7", "--top-k", "9", "--seed", "5", *FEW]
    record = run_json(capsys, "abc", "a", "--model", checkpoint, *flags)
    options = twotower.GenerateOptions(
        mode=mode, temperature=0.7, top_k=9, seed=5, max_new_tokens=6, ignore_eos=True
    )
    model, tokenizer = load_checkpoint(checkpoint), twotower.load_tokenizer(checkpoint)
    expected = twotower.generate(model, ["abc", "a"], options, tokenizer)
    assert record["model"] == checkpoint
    assert record["results"] == [
        {
            "prompt": prompt,
            "text": out.text,
            "tokens": out.tokens,
            "nfe": out.nfe,
            "context_forwards": out.context_forwards,
            "lookup_tokens": out.lookup_tokens,
            "denoiser_tokens": out.denoiser_tokens,
            "tokens_per_nfe": 6 / out.nfe if out.nfe else None,
            "finish_reason": "length",
        }
        for prompt, out in zip(["abc", "a"], expected, strict=True)
    ]
    rate, seconds = record["tokens_per_s"], record["seconds"]
    assert isinstance(rate, float) and isinstance(seconds, float)
    assert rate * seconds == pytest.approx(12)


def test_only_given_flags_override_the_checkpoints_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against library defaults that arrive as if the user had typed them."""
    folder = make_checkpoint(tmp_path / "m", max_new_tokens=5, temperature=0.5, steps_per_block=3)
    record = run_json(capsys, "a", "--model", str(folder), "--temperature", "0", "--top-k", "0")
    options = record["options"]
    assert isinstance(options, dict)
    assert options["max_new_tokens"] == 5 and options["steps_per_block"] == 3
    assert options["temperature"] == 0.0 and options["top_k"] == 0


@pytest.mark.parametrize(("mode", "towers"), [("ar", "context"), ("diffusion", "both")])
def test_ar_loads_the_context_tower_alone(
    mode: str,
    towers: str,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against AR that needs twice the memory."""
    asked = []

    def watched(*arguments: object, **named: object) -> twotower.TwoTower:
        asked.append(named["towers"])
        return load_checkpoint(*arguments, **named)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(loading, "load_checkpoint", watched)
    assert main(["generate", "a", "--model", checkpoint, "--mode", mode, *FEW]) == 0
    assert asked == [towers]


def test_the_trace_agrees_with_the_result(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against events that are missing from the file or of another run."""
    file = tmp_path / "trace.jsonl"
    record = run_json(capsys, "abc", "a", "--model", checkpoint, "--trace", str(file), *FEW)
    results = record["results"]
    assert isinstance(results, list)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert {event["event"] for event in events} == {"StepTaken", "TokensCommitted", "Finished"}
    for row, result in enumerate(results):
        own = [event for event in events if event["row"] == row]
        steps = [event for event in own if event["event"] == "StepTaken"]
        commits = [event for event in own if event["event"] == "TokensCommitted"]
        assert [t for event in commits for t in event["tokens"]] == result["tokens"]
        assert "".join(event["text"] for event in commits) == result["text"]
        assert steps[-1]["nfe"] == result["nfe"] and not any(steps[-1]["is_masked"])
        ending = own[-1]["completion"]
        # Neither log-probabilities nor a prefix cache were asked for.
        assert (ending.pop("logprobs"), ending.pop("cached_tokens")) == (None, 0)
        assert ending.items() <= result.items()


def test_prompts_from_stdin_a_file_and_jsonl_are_the_same(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against a line break of the file that becomes part of the prompt."""
    text, lines = tmp_path / "prompt.txt", tmp_path / "prompts.jsonl"
    text.write_text("ab\nc\n")
    lines.write_text('{"prompt": "ab\\nc"}\n\n{"prompt": [1, 5, 9]}\n')
    flags = ["--model", checkpoint, *FEW]
    wanted = run_json(capsys, "ab\nc", *flags)["results"]
    assert run_json(capsys, "--input", str(text), *flags)["results"] == wanted
    for dash in ([], ["-"]):
        give_stdin(monkeypatch, b"ab\nc\n")
        assert run_json(capsys, *dash, *flags)["results"] == wanted
    first, second = run_json(capsys, "--input", str(lines), *flags)["results"]  # type: ignore[misc]
    assert [first] == wanted and second["prompt"] == [1, 5, 9]


def test_plain_text_is_the_new_text_alone(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", checkpoint, *FEW]
    results = run_json(capsys, "abc", "a", *flags)["results"]
    assert isinstance(results, list)
    first, second = (result["text"] for result in results)
    assert main(["generate", "abc", *flags]) == 0
    assert capsys.readouterr() == (f"{first}\n", "")
    assert main(["generate", "abc", "a", *flags]) == 0
    assert capsys.readouterr().out == f"==> prompt 0 <==\n{first}\n==> prompt 1 <==\n{second}\n"


def test_a_terminal_sees_the_text_as_it_is_committed(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", checkpoint, *FEW]
    wanted = run_json(capsys, "abc", *flags)["results"][0]  # type: ignore[index]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", "abc", *flags]) == 0
    out, err = capsys.readouterr()
    assert out == printable(wanted["text"]) + "\n"
    assert (
        err.startswith("6 tokens in ") and f"NFE {wanted['nfe']} " in err and err.count("\n") == 1
    )


def test_stop_may_be_repeated(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a second --stop that replaces the first."""
    flags = ["--model", checkpoint, "--mode", "ar", *FEW]
    text = run_json(capsys, "abc", *flags)["results"][0]["text"]  # type: ignore[index]
    for stops in (["zz", text[1]], [text[1], "zz"]):
        given = [part for stop in stops for part in ("--stop", stop)]
        result = run_json(capsys, "abc", *flags, *given)["results"][0]  # type: ignore[index]
        assert result["finish_reason"] == "stop"
        assert result["text"] == text[: text.index(text[1])]


def test_a_model_without_tokenizer_takes_and_gives_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": [1, 5, 9]}\n')
    flags = ["--input", str(prompts), "--model", str(folder), *FEW]
    result = run_json(capsys, *flags)["results"][0]  # type: ignore[index]
    assert result["text"] is None
    assert main(["generate", *flags]) == 0
    assert capsys.readouterr().out == " ".join(map(str, result["tokens"])) + "\n"
    for verb in (["generate", "abc"], ["chat"], ["evaluate"], ["bench"]):
        assert main([*verb, "--model", str(folder)]) == 2, verb
        assert f"--model {folder} has no tokenizer.json; add" in capsys.readouterr().err, verb


def test_a_gguf_file_without_a_tokenizer_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards "add tokenizer.json", which nobody can add to a file."""
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    export_gguf(fresh_model(hybrid_override_pattern="M*"), file)
    assert main(["generate", "abc", "--model", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--model {file} was written without a tokenizer; export it anew" in error


def test_a_block_larger_than_the_trained_one_warns_in_one_line(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a", "--model", checkpoint, "--block-size", "9", "-n", "9"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: blocks of 9 tokens are larger than the 4 the model was trained with; "
        "expect the text to collapse"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([""], "prompt 0 is empty"),
        (["a", ""], "prompt 1 is empty"),
        (["\udcff"], "prompt 0 is not UTF-8 text"),
        (["a", "--block-size", "0"], "--block-size 0 must be at least 1"),
        (["a", "--confidence-threshold", "1.5"], "--confidence-threshold 1.5 must"),
        (["a", "--temperature", "-1"], "--temperature -1.0 must"),
        (["a", "--trace", "{tmp}/no/such/trace"], "trace: cannot write"),
        (["a", "--trace", "/dev/full"], "trace: cannot write /dev/full (No space left"),
        (
            ["a", "--model", "{tmp}/no/model"],
            "/no/model is not a file or folder; give a check",
        ),
        (["a", "-m", "{tmp}/no/model"], "error: -m: "),
        (
            ["a", "--denoiser", "{tmp}/no"],
            "/no is not a file or folder; give a folder that",
        ),
        (["a", "--device", "abacus"], "--device abacus is unknown"),
        (["a", "--device", "cpu:1"], "--device cpu:1 is not on this machine; use cpu"),
        (["a", "--overlap", "on", "--mode", "ar"], "--overlap: has no effect in mode ar, or on"),
        (["--input", "{tmp}/none"], "input: cannot read"),
        (["--input", "{tmp}"], "input: cannot read"),
        (["--input", "{tmp}/latin.txt"], "latin.txt is not UTF-8 text (byte 1)"),
        (["--input", "{tmp}/nothing.jsonl"], "holds no prompt"),
        (["--input", "{tmp}/text.jsonl"], "line 1 is not JSON"),
        (["--input", "{tmp}/other.jsonl"], 'line 2 has no "prompt"'),
        (["--input", "{tmp}/vocabulary.jsonl"], "token 41 outside the vocabulary; use 0 to 40"),
        (["--input", "{tmp}/mask.jsonl"], "has the mask token 3"),
        (["--input", "{tmp}/empty.jsonl"], "prompt 0 is empty"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    said: str,
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against tracebacks, and against input that is quietly repaired."""
    for name, content in {
        "latin.txt": b"a\xe9",
        "nothing.jsonl": b"\n",
        "text.jsonl": b"abc\n",
        "other.jsonl": b'{"prompt": "a"}\n{"text": "a"}\n',
        "vocabulary.jsonl": b'{"prompt": [1, 41]}\n',
        "mask.jsonl": b'{"prompt": [1, 3]}\n',
        "empty.jsonl": b'{"prompt": []}\n',
    }.items():
        (tmp_path / name).write_bytes(content)
    model = [] if {"--model", "-m"} & set(arguments) else ["--model", checkpoint]
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["generate", *given, *model]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("truncate", "truncated or not a safetensors file"),
        ("config", "config.json"),
        ("no weights", "add the weights"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_status_2(
    damage: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(tmp_path / "m")
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
    else:
        (folder / f"{damage}.json").write_text('{"hidden_size": 3}')
    assert main(["generate", "a", "--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_no_prompt_at_a_terminal(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a command that waits for input without a word."""
    give_stdin(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["generate", "--model", checkpoint]) == 2
    assert capsys.readouterr().err.startswith("error: no prompt; give one")


def test_an_installation_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files.resources, "files", lambda package: tmp_path)
    assert main(["generate", "a"]) == 2
    assert "--model: this installation has none inside; give a path" in capsys.readouterr().err


def test_penalties_and_biases_are_flags(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against flags that are read and do nothing."""
    flags = ["--model", checkpoint, "--mode", "ar", *FEW]
    plain = run_json(capsys, "abc", *flags)["results"][0]["tokens"]  # type: ignore[index]
    bias = f"{plain[0]}=-100"
    for more in (["--repetition-penalty", "50"], ["--logit-bias", bias, "--logit-bias", "7=-100"]):
        record = run_json(capsys, "abc", *flags, *more)
        assert record["results"][0]["tokens"] != plain  # type: ignore[index]
    assert record["options"]["logit_bias"] == [[plain[0], -100.0], [7, -100.0]]  # type: ignore[index]
    assert main(["generate", "abc", *flags, "--logit-bias", "18"]) == 2
    said = "--logit-bias 18 must be a token id, = and a number, such as 42=-100"
    assert said in capsys.readouterr().err


def test_a_line_break_may_be_spelt_in_an_argument(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a prompt that silently holds a backslash and an n where its writer saw a new line."""
    given = ["--model", checkpoint, *FEW, "--json"]
    assert main(["generate", r"a\nb", *given]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"][0]["prompt"] == r"a\nb"
    assert err == (
        r"note: prompt 0 has \n as two characters; with --escape it is a line break" "\n"
    )
    assert main(["generate", r"a\nb\t\\n\q", "--escape", *given]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"][0]["prompt"] == "a\nb\t\\n\\q" and err == ""
    assert main(["generate", "a", "--stop", r"\n", *given]) == 0
    assert capsys.readouterr().err.startswith("note: --stop has ")
    assert main(["generate", "a", "--stop", r"\n", "--escape", *given]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["options"]["stop"] == ["\n"] and err == ""
    assert main(["generate", "print('a\\n')\n", *given]) == 0  # who writes both means both
    assert capsys.readouterr().err == ""


def test_a_prompt_unlike_the_training_text_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the first prompt of one's own, which the shipped model answers with nonsense."""
    known = "Q: What is 48 + 27?\nA:"
    assert main(["generate", known, "Hello, who are you?", "hi", "-n", "4"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("note: prompt 1 is unlike the model's training text (")
    assert err.count("\n") == 1
    assert main(["generate", known, "-n", "4"]) == 0 and capsys.readouterr().err == ""


def test_endings_of_names_count_in_any_letters(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a .JSONL file that is read as one prompt, and a .JSON schema that becomes a regex."""
    lines, schema, lark = (tmp_path / name for name in ("IN.JSONL", "S.JSON", "G.LARK"))
    lines.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    record = run_json(capsys, "--input", str(lines), "--model", checkpoint, *FEW)
    assert [one["prompt"] for one in record["results"]] == ["a", "b"]  # type: ignore[attr-defined]
    schema.write_text('{"type": "integer"}')
    lark.write_text('start: "a"')
    assert [read_grammar(file).kind for file in (schema, lark)] == ["json_schema", "lark"]


def test_a_text_that_ends_at_once_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards who gives a chat model a bare question: nothing was printed, and nothing said why."""
    folder = make_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    eos = twotower.load_tokenizer(folder).eos_id
    asked = ["generate", "abc", "--model", str(folder), "--mode", "ar", "-n", "4"]
    assert main([*asked, f"--logit-bias={eos}=100"]) == 0
    out, err = capsys.readouterr()
    assert out == "\n" and err.count("\n") == 1 and "prompt 0 at once; it has a chat templ" in err
    assert main(asked) == 0
    assert "at once" not in capsys.readouterr().err
