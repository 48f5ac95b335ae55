"""`twotower chat`: a conversation in the terminal, with a server or a model in this process."""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from twotower.checkpoint.files import SHIPPED
from twotower.cli.decoding import TextOptions, decoding_flags, refuse_without_denoiser
from twotower.cli.progress import load_with_bar
from twotower.cli.prompts import read_argument
from twotower.cli.serve import TemplateOptions, describe, need_extra
from twotower.cli.text import one_line, printable
from twotower.engine import GenerateOptions
from twotower.engine.resolved import SAMPLED_ONLY, refuse_sampling
from twotower.loading import Placement, placement_of

if TYPE_CHECKING:
    from twotower.cli.chat_backends import Backend


_HELP = """\
/new            forget the conversation
/undo           take back your last message and its reply
/again          another reply to your last message
/system TEXT    what stands before the conversation; without TEXT, nothing
/set NAME VALUE a field of the requests, such as mode, temperature, max_tokens, seed; without
                VALUE it is left out again
/show           settings and conversation
/help           this
/exit           the end; so does Ctrl-D
Ctrl-C stops a reply. A line that ends with \\ continues on the next."""


_SHIPPED = """\
The shipped model shows the method and is not an assistant. It knows a few kinds of questions:
  How much is 48 - 44?
  What is 77 in Spanish?
  Zoe has 70 buttons. She buys 10 more and loses 15. How many buttons does Zoe have now?
A real model: twotower chat --model FOLDER, GGUF file or hub id; README.md fetches a small one."""


@dataclass(frozen=True, kw_only=True)
class ChatArguments(TemplateOptions, TextOptions, Placement):
    """Chat in the terminal, with a model in this process or with a server. /help lists commands.

    The shipped model knows questions of a few kinds only; it is not an assistant.

    The default of a decoding option is the checkpoint's (generation_config.json), else the one
    shown; with --url the server's.
    """

    url: str | None = None
    """Server with OpenAI's API, such as http://127.0.0.1:8000. Default: load --model here."""
    api_key_env: str = "TWOTOWER_API_KEY"
    """Environment variable with the server's API key."""
    system: str | None = None
    """System message."""
    escape: bool = False
    r"""Replace \n, \t and \\ in --system and --stop by line break, tab and backslash."""
    seed: int | None = None
    """Seed of the random numbers of replies. Default: a random one."""
    decoding: Annotated[dict[str, object], decoding_flags("logprobs", "seed")]
    """How to decode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.given.get("temperature") == 0:
            refuse_sampling(self.given)
        self.generate_options()
        _ = self.variables
        if self.url is not None:
            usual = Placement()
            for name in (*vars(TemplateOptions()), *vars(usual)):
                if name != "model" and getattr(self, name) != getattr(usual, name, None):
                    raise ValueError(f"{name}: is the server's with --url; leave it out")
        elif self.api_key_env != ChatArguments.api_key_env:
            raise ValueError("api_key_env: no effect without --url; leave it out")
        if self.escape and self.system is None and not self.stop:
            raise ValueError("escape: no effect without --system or --stop; leave it out")

    @cached_property
    def given(self) -> dict[str, object]:
        """The decoding options that were named."""
        named = self.named(self.decoding, self.escape)
        return named if self.seed is None else {**named, "seed": self.seed}

    def generate_options(self) -> GenerateOptions:
        """The same, checked."""
        return GenerateOptions(**self.given)  # type: ignore[arg-type]  # checked by __post_init__

    def settings(self) -> dict[str, object]:
        """Fields of every request that were named, as servers call them."""
        named = {} if self.url is None or self.model is None else {"model": self.model}
        calls = {"max_new_tokens": "max_tokens"}
        return {**named, **{calls.get(name, name): value for name, value in self.given.items()}}


def run(options: ChatArguments) -> int:
    """Talk until the end of input; returns the exit status. Errors arrive as ValueError."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history
    system = options.system
    if system is not None:
        system = read_argument(system, "--system", options.escape)
    talk = Talk(system, options.settings())
    is_terminal = sys.stdin.isatty()
    with contextlib.closing(_backend(options)) as backend:
        _refuse_greedy_sampling(talk, backend)
        if options.url is None and options.given:
            _try_out(talk, backend)
        if is_terminal:
            print(f"{backend.name}; /help lists commands, Ctrl-D ends", file=sys.stderr)
            if options.url is None and options.model in (None, SHIPPED):
                print(_SHIPPED, file=sys.stderr)
        while (line := _read_line(is_terminal)) is not None:
            if line.strip() and not _take(talk, backend, line.strip()):
                break
    return 0


def _backend(options: ChatArguments) -> "Backend":
    with need_extra("chat"):
        from twotower.cli.chat_backends import Local, Remote

        if options.url is not None:
            remote = Remote(options.url, os.environ.get(options.api_key_env))
            remote.connect()
            return remote
        asked = options.generate_options()
        refuse_without_denoiser(options, asked)
        loaded = load_with_bar(placement_of(options), asked.mode, only_decodes=True)
        served = describe(loaded, options)
        if served.template is None:
            raise ValueError(f"model={loaded.name} has no chat template; give --chat-template FILE")
        return Local(loaded, served)


def _read_line(is_terminal: bool) -> str | None:
    """What the user says next, over several lines if they end with a backslash; None at the end."""
    lines: list[str] = []
    while True:
        try:
            lines.append(input(("... " if lines else "> ") if is_terminal else ""))
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)", file=sys.stderr)
            lines = []
            continue
        if not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1][:-1]


@dataclass
class Talk:
    """A conversation so far and the fields of its requests."""

    system: str | None = None
    settings: dict[str, object] = field(default_factory=dict)
    turns: list[dict[str, object]] = field(default_factory=list)

    def body(self) -> dict[str, object]:
        """The request for the next reply."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {**self.settings, "messages": [*first, *self.turns]}

    def undo(self) -> str | None:
        """Take back the last message of the user, and all after it; returns it."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return str(turn["content"])
        return None


def _take(talk: Talk, backend: "Backend", line: str) -> bool:
    """Do what a line says; False ends the conversation."""
    if not line.startswith("/"):
        _say(talk, backend, line)
        return True
    command, _, rest = line.partition(" ")
    match command, rest.strip():
        case "/exit" | "/quit", "":
            return False
        case "/new", "":
            talk.turns.clear()
        case "/undo", "":
            talk.undo()
        case "/again", "":
            if (last := talk.undo()) is not None:
                _say(talk, backend, last)
        case "/system", text:
            talk.system = text or None
        case "/set", text:
            _set(talk, backend, *text.partition(" ")[::2])
        case "/show", "":
            print(json.dumps(talk.body(), indent=2, ensure_ascii=False), file=sys.stderr)
        case "/help", "":
            print(_HELP, file=sys.stderr)
        case _:
            print(f"{line!r} is not a command; /help lists them", file=sys.stderr)
    return True


def _set(talk: Talk, backend: "Backend", name: str, value: str) -> None:
    """Change a field, unless whoever replies refuses it."""
    if not name or name in ("messages", "stream", "stream_options", "n"):
        print("/set NAME VALUE; NAME is a field such as mode or temperature", file=sys.stderr)
        return
    before = dict(talk.settings)
    talk.settings.pop(name, None)
    if value.strip():
        try:
            talk.settings[name] = json.loads(value)
        except ValueError:
            talk.settings[name] = value.strip()
    try:
        _refuse_greedy_sampling(talk, backend)
        _try_out(talk, backend)
    except ValueError as error:
        talk.settings = before
        print(f"[{error}; {name} stays as it was]", file=sys.stderr)


def _refuse_greedy_sampling(talk: Talk, backend: "Backend") -> None:
    """ValueError for fields that need a temperature above 0: servers take and drop them."""
    if {*talk.settings} & {*SAMPLED_ONLY}:
        temperature = talk.settings.get("temperature")
        if (backend.default_temperature() if temperature is None else temperature) == 0:
            refuse_sampling(talk.settings)


def _try_out(talk: Talk, backend: "Backend") -> None:
    """Begin a reply and leave it: ValueError (one line) if such requests are refused."""
    asked = Talk(talk.system, talk.settings, [{"role": "user", "content": "?"}])
    with contextlib.closing(backend.reply(asked.body())) as chunks:
        next(chunks, None)


def _say(talk: Talk, backend: "Backend", message: str) -> None:
    """Send a message and print the reply as it comes; a refused message is taken back."""
    talk.turns.append({"role": "user", "content": message})
    parts: list[str] = []
    usage: dict[str, object] = {}
    try:
        with contextlib.closing(backend.reply(talk.body())) as chunks:
            for chunk in chunks:
                text = _text_of(chunk)
                if notice := chunk.get("notice"):
                    print(f"(this is {notice})", file=sys.stderr)
                    continue
                usage = chunk.get("usage") or usage  # type: ignore[assignment]
                parts.append(text)
                print(printable(text), end="", flush=True)
    except KeyboardInterrupt:
        parts.append("")
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    except ValueError as error:
        print(f"{'' if not any(parts) else ' '}[{one_line(error)}]", file=sys.stderr)
    if not parts:
        talk.turns.pop()
        return
    print()
    talk.turns.append({"role": "assistant", "content": "".join(parts)})
    if usage and sys.stderr.isatty():
        print(f"({_figures(usage)})", file=sys.stderr)


def _text_of(chunk: dict[str, object]) -> str:
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    return str(choices[0]["delta"].get("content") or "")


def _figures(usage: dict[str, object]) -> str:
    names = ("completion_tokens", "nfe", "context_forwards", "tokens_per_nfe")
    return ", ".join(f"{name} {usage[name]}" for name in names if usage.get(name) is not None)
