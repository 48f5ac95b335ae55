"""`twotower chat`: what a conversation sends, shows and survives, in process and over HTTP."""

import io
import json
import sys
from collections.abc import Iterator

import pytest

from raw_http import wait_for
from serving import Running, running, shipped, tiny
from twotower.cli import chat
from twotower.cli.chat_backends import Local, Remote
from twotower.cli.main import main
from twotower.cli.serve import describe

SUM = "How much is 48 - 44?"
ANSWER = "48 - 44 = 0 + 4 = 4. The answer is 4."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    backend = Local(shipped(), describe(shipped()))
    yield backend
    backend.close()


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_with_a_server(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, SUM, "/again", "What is \\", "77 in Spanish?", "/show")
    assert main(["chat", "--url", server.url, "--mode", "ar", "--max-tokens", "60"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:2] == [ANSWER, ANSWER] and len(lines) == 3
    shown = json.loads(err[err.index("{") :])
    assert shown["mode"] == "ar" and shown["max_tokens"] == 60
    assert [turn["role"] for turn in shown["messages"]] == ["user", "assistant"] * 2
    assert shown["messages"][2]["content"] == "What is \n77 in Spanish?"


def test_a_system_message_may_have_line_breaks(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a backslash and an n in the prompt, where --prompt can say a line break."""
    say(monkeypatch, "/show")
    system = ["--system", r"a\nb"]
    assert main(["chat", "--url", server.url, "--escape", *system]) == 0
    err = capsys.readouterr().err
    assert json.loads(err[err.index("{") :])["messages"][0]["content"] == "a\nb"
    assert main(["chat", "--url", server.url, *system]) == 0
    assert "--system has \\n as two characters" in capsys.readouterr().err
    assert main(["chat", "--url", server.url, "--escape"]) == 2
    assert "--escape: no effect without --system" in capsys.readouterr().err


def test_an_option_is_not_dropped_by_a_greedy_server(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards --top-k that a server takes and leaves out, as its default is greedy decoding."""
    assert main(["chat", "--url", server.url, "--top-k", "5"]) == 2
    assert "error: --top-k 5: has no effect at temperature 0" in capsys.readouterr().err
    say(monkeypatch, "/show")
    assert main(["chat", "--url", server.url, "--top-k", "5", "--temp", "0.5"]) == 0
    # Of a server that does not tell its default nothing is known.
    assert main(["chat", "--url", f"{server.url}/elsewhere", "--top-k", "5"]) == 0


def test_a_refusal_is_shown_and_taken_back(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a refused message that spoils every later request."""
    lost = "x" * 100_000  # longer than the server reads
    say(monkeypatch, lost, SUM, "/nonsense", "/exit", "never")
    assert main(["chat", "--url", server.url]) == 0
    out, err = capsys.readouterr()
    assert out == f"{ANSWER}\n"
    assert "[prompt: is too long" in err and "is not a command" in err


@pytest.mark.parametrize("is_local", [True, False])
def test_a_setting_that_fails_later_is_refused_at_once(
    is_local: bool, server: Running, local: Local, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a value that is taken, and then spoils every reply."""
    backend = local if is_local else Remote(server.url, None)
    talk = chat.Talk(settings={"temperature": 0.5})
    for text, said in (
        ("mode sideways", "mode: input should be 'diffusion'"),
        ("temperature -1", "temperature=-1.0 must be a finite number, at least 0.0"),
        ("temperature warm", "temperature: input should be a valid number"),
        ("tmeperature 1", "perhaps temperature"),
        ("top_p 0", "top_p=0.0 must be between"),
        ("max_tokens 100000000", "is more than this server allows"),
    ):
        assert chat._take(talk, backend, f"/set {text}")
        assert said in capsys.readouterr().err and talk.settings == {"temperature": 0.5}
    chat._take(talk, backend, "/set top_k 5")
    assert capsys.readouterr().err == ""
    for command in ("temperature", "temperature 0"):  # top_k would be dropped without a word
        chat._take(talk, backend, f"/set {command}")
        said = "top_k=5: has no effect at temperature 0, which is greedy"
        assert said in capsys.readouterr().err
    assert talk.settings == {"temperature": 0.5, "top_k": 5}
    before = local._worker.stats().tokens
    talk.system = "Explain quantum computing in simple terms!"  # a notice comes before any text
    chat._take(talk, backend, "/set ignore_eos true")  # a reply that would never end by itself
    chat._take(talk, backend, "/set max_tokens 2000")
    if is_local:
        wait_for(lambda: local._worker.stats().rows_in_flight == 0)
        assert local._worker.stats().tokens < before + 2000
    else:
        server.wait_until_idle(2.0)


def test_in_process_and_over_http_give_the_same_chunks(server: Running, local: Local) -> None:
    body = {"messages": [{"role": "user", "content": SUM}], "mode": "diffusion"}
    texts = []
    for backend in (local, Remote(server.url, None)):
        chunks = list(backend.reply(body))
        texts.append([chat._text_of(chunk) for chunk in chunks if chat._text_of(chunk)])
        assert chunks[-1]["usage"]["completion_tokens"] > 0  # type: ignore[index]
    assert texts[0] == texts[1] and len(texts[0]) > 1
    for backend in (local, Remote(server.url, None)):
        with pytest.raises(ValueError, match="presence_penalty: has no effect in mode diff"):
            list(backend.reply({**body, "presence_penalty": 1}))


@pytest.mark.parametrize("is_local", [True, False])
def test_ctrl_c_stops_a_reply_and_frees_its_row(
    is_local: bool, server: Running, local: Local, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a reply that goes on unseen, and against one that ends the program."""

    class Interrupted:
        """The backend, and a Ctrl-C after its second chunk."""

        name = "interrupted"
        backend = local if is_local else Remote(server.url, None)

        def reply(self, body: dict[str, object]) -> Iterator[dict[str, object]]:
            with chat.contextlib.closing(self.backend.reply(body)) as chunks:
                yield next(chunks)
                yield next(chunks)
                raise KeyboardInterrupt

    talk = chat.Talk(settings={"mode": "ar", "ignore_eos": True, "max_tokens": 2000})
    chat._say(talk, Interrupted(), SUM)  # type: ignore[arg-type]  # closes itself
    assert "[stopped]" in capsys.readouterr().err
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    if not is_local:
        server.wait_until_idle(2.0)
        return
    talk.settings = {"max_tokens": 60}
    talk.turns.clear()
    chat._say(talk, local, SUM)
    assert talk.turns[1]["content"] == ANSWER


def test_replies_take_the_decoding_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silent failure: a flag of generate's that chat takes, and forgets to send."""
    say(monkeypatch, SUM, "/show")
    flags = ["--temp", "0.7", "--top-k", "1", "--seed", "3", "--stop", r"\n", "--escape"]
    flags += ["--eos-token-id", "5", "--logit-bias", "6=-1", "--mode", "ar", "-n", "9"]
    assert main(["chat", *flags]) == 0
    out, err = capsys.readouterr()
    assert ANSWER.startswith(out.strip()) and out.strip()
    shown = json.loads(err[err.index("{") :])
    del shown["messages"]
    assert shown == {
        **{"mode": "ar", "max_tokens": 9, "temperature": 0.7, "top_k": 1, "seed": 3},
        **{"stop": ["\n"], "eos_token_id": [5], "logit_bias": {"6": -1.0}},
    }


def test_what_cannot_work_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--url", "ftp://x"], "must be the address of a server"),
        (["--url", "http://x", "--chat-template", "f"], "is the server's with --url"),
        (["--model", tiny().name], "has no chat template"),
        (["--top-k", "5"], "--top-k 5: has no effect at temperature 0"),
        (["--url", "http://x", "--temp", "0", "--min-p", "0.1"], "--min-p 0.1: has no effect at"),
        (["--mode", "ar", "--steps-per-block", "4"], "--steps-per-block: has no effect in mode ar"),
        (["--eos-token-id", "99999"], "--eos-token-id 99999 is outside the vocabulary"),
        (["--logprobs", "2"], "unrecognized options: --logprobs"),
        (["--escape"], "--escape: no effect without --system or --stop"),
    ):
        assert main(["chat", *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a script whose conversation is empty, for which nothing would be wrong."""
    say(monkeypatch)
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: --url http://127.0.0.1:9 does not answer (")


def test_a_message_unlike_the_training_text_is_noticed(
    local: Local, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards the first message of one's own, which the shipped model answers with nonsense."""
    talk = chat.Talk(settings={"max_tokens": 4})
    chat._say(talk, local, "Hello, who are you?")
    assert "(this is unlike the model's training text (" in capsys.readouterr().err
    assert chat._take(talk, local, "/new")
    chat._say(talk, local, SUM)
    assert capsys.readouterr().err == ""
    assert chat._take(talk, local, "/set seed 3") and capsys.readouterr().err == ""
