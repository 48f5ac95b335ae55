"""A conversation into token ids, by the checkpoint's own Jinja template.

The template runs in jinja2's sandbox. What a caller wrote can never become a special token: its
written form is covered before rendering and encoded as plain letters afterwards.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twotower.serve.errors import ApiError
from twotower.serve.tool_calls import BARE, HERMES, ToolStyle
from twotower.tokenizer import TOKENIZER_CONFIG_FILE, Tokenizer

CHAT_TEMPLATE_FILE = "chat_template.jinja"
# As the shipped model's training text writes questions and tool calls; see docs/serving.md.
PLAIN = """\
{{- bos_token }}
{%- set asks, answers = ('User: ', 'Call:') if tools else ('Q: ', 'A:') %}
{%- for message in messages if message.role == 'system' %}{{ message.content }}
{% endfor %}
{%- if tools %}Tools:
{% for tool in tools %}{{ tool.function.name }}(
{%- for name, field in ((tool.function.parameters or {}).properties or {}).items() %}
{{- name }}: {{ field.type or 'string' }}{{ ', ' if not loop.last }}
{%- endfor %})
{% endfor %}{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}{{ asks }}{{ message.content }}
{% elif message.role == 'tool' %}Result: {{ message.content }}
{% elif message.tool_calls %}{% for call in message.tool_calls %}Call: {{ {'name':
call.function.name, 'arguments': call.function.arguments} | tojson }}
{% endfor %}{% else %}{{ answers }} {{ message.content }}
{% endif %}{% endfor %}
{{- answers }}"""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template's source and the special tokens that it may write."""

    source: str
    special: Mapping[str, str]  # such as bos_token, by the names that templates use
    strips_reply: bool = False  # whether a reply's first blank belongs to the format

    @property
    def tool_style(self) -> ToolStyle:
        """How the model was taught to write calls, as far as its template shows."""
        return HERMES if HERMES.begin.strip() in self.source else BARE

    @property
    def has_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return "tools" in self.source

    def encode(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        tokenizer: Tokenizer,
    ) -> list[int]:
        """Token ids of a prompt for the next reply; ApiError 400 where the template refuses."""
        cover = _Cover(tokenizer.special_texts)
        context = {"messages": cover.all(messages), "tools": cover.all(tools)}
        text = self._render(context)
        ids: list[int] = []
        for piece, is_template in cover.pieces(text):
            ids += tokenizer.encode(piece, allow_special=is_template)
        return ids

    def _render(self, context: Mapping[str, object]) -> str:
        try:
            template = _environment().from_string(self.source)
            return str(template.render(**self.special, **context, add_generation_prompt=True))
        except TemplateError as error:
            raise ApiError(
                400, f"messages: the model's chat template refuses them ({error})", param="messages"
            ) from None
        except Exception as error:  # a template is a program: it can fail in any way
            raise ApiError(
                400,
                f"messages: the model's chat template fails ({type(error).__name__}: {error})",
                param="messages",
            ) from None


def read_template(folder: Path, instead: Path | None = None) -> ChatTemplate | None:
    """The template of a checkpoint folder, from chat_template.jinja or tokenizer_config.json,
    or from the file that is given instead; ValueError (one line) if that cannot be read.
    """
    file, config_file = instead or folder / CHAT_TEMPLATE_FILE, folder / TOKENIZER_CONFIG_FILE
    config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
    if instead is not None and not instead.is_file():
        raise ValueError(f"chat_template: there is no file {instead}")
    source = file.read_text("utf-8") if file.is_file() else _named_default(config)
    return None if source is None else ChatTemplate(source=source, special=_special(config))


def plain_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The format of the shipped model."""
    bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    return ChatTemplate(source=PLAIN, special={"bos_token": bos}, strips_reply=True)


def _named_default(config: Mapping[str, object]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special(config: Mapping[str, object]) -> dict[str, str]:
    special = {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            special[name] = text
    return special


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = time.strftime
    return environment


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # jinja2's own escapes <, > and quotes for HTML.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise(message: str) -> None:
    raise TemplateError(message)


class _Cover:
    """Stand-ins for the written forms of special tokens in what a caller sent."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(texts)
        nonce = secrets.token_hex(8)  # nobody can write a stand-in themselves
        self._stand_ins = [f"\ue000{nonce}.{number}\ue001" for number in range(len(texts))]
        longest_first = sorted(map(re.escape, texts), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or r"(?!)")
        self._covered = re.compile(f"(\ue000{nonce}\\.[0-9]+\ue001)")

    def all(self, value: object) -> object:
        """A copy of JSON-able data with every special token covered."""
        match value:
            case str():
                return self._special.sub(self._stand_in, value)
            case Mapping():
                return {str(self.all(key)): self.all(part) for key, part in value.items()}
            case Sequence():
                return [self.all(part) for part in value]
            case _:
                return value

    def _stand_in(self, found: "re.Match[str]") -> str:
        return self._stand_ins[self._texts.index(found[0])]

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Parts of a rendered text in order, and whether special tokens in it are meant."""
        for number, part in enumerate(self._covered.split(text)):
            if part:
                covered = number % 2 == 1
                yield (self._texts[self._stand_ins.index(part)] if covered else part), not covered
