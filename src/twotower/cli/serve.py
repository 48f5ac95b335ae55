"""`twotower serve`: a model behind OpenAI's API, with a page to watch it."""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from twotower.checkpoint.files import SHIPPED
from twotower.cli.progress import load_with_bar
from twotower.engine import (
    MODES,
    EngineOptions,
    GenerateOptions,
    Worker,
    defaults_of,
    resolve_options,
)
from twotower.engine.notice import prompt_notice
from twotower.engine.resolved import DENOISER_ONLY, FIELD_MODES, MODES_OF_BACKBONES, Mode
from twotower.loading import Loaded, Placement, placement_of
from twotower.serve import ServeOptions, replicas
from twotower.serve.options import check_variables
from twotower.serve.replicas import ReplicaOptions, ReplicatedOptions

_ABOUT = (
    "A small model that shows the method and is no assistant: it answers sums, short functions, "
    "edits, tool calls, translations of short phrases and facts on countries, in the form of the "
    "examples."
)
if TYPE_CHECKING:
    from twotower.serve.access import Keys
    from twotower.serve.app import App
    from twotower.serve.chat import ChatTemplate
    from twotower.serve.requests import Served

# What a client wants to know of a request that names nothing.
_SHOWN = (
    "max_new_tokens",
    "temperature",
    "confidence_threshold",
    "steps_per_block",
    "first_token",
    "verify_threshold",
    "drafts",
    "draft_passes",
    "block_size",
)


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """How a conversation becomes a prompt."""

    chat_template: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Jinja chat template. Default: the checkpoint's."""
    chat_template_kwargs: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None
    """Variables of the chat template as a JSON object, such as '{"enable_thinking": false}'."""

    @property
    def variables(self) -> dict[str, object]:
        """The template's variables; ValueError (one line) for another JSON value, or none."""
        text = self.chat_template_kwargs
        try:
            found = {} if text is None else json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"chat_template_kwargs={text!r} must be a JSON object, such as "
                '{"enable_thinking": false}'
            )
        check_variables(found)
        return found


@dataclass(frozen=True, kw_only=True)
class ServeArguments(TemplateOptions, ReplicatedOptions, Placement):
    """Serve a model over HTTP: OpenAI's API below /v1, and a page at / that shows how blocks fill.

    OpenAI's clients take it as base_url=http://127.0.0.1:8000/v1.
    """

    prefix_cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        Placement.__post_init__(self)
        ServeOptions.__post_init__(self)
        EngineOptions.__post_init__(self)
        ReplicaOptions.__post_init__(self)
        _ = self.variables  # refused before the model is loaded
        if self.ray and self.denoiser_device == "peer":
            raise ValueError(
                "denoiser_device=peer: a replica is one process; leave out --ray, or name a device"
            )


def run(options: ServeArguments) -> int:
    """Serve until a signal; returns the exit status. Errors of the user arrive as ValueError."""
    with need_extra("serve"):
        from twotower.serve import server
    logging.getLogger("twotower.serve").setLevel(logging.INFO)
    keys = server.read_checked_keys(options)
    build = functools.partial(build_app, options, keys)
    if options.ray:
        replicas.run(build, options)
    else:
        server.run(build(), options)
    return 0


def build_app(options: ServeArguments, keys: "Keys") -> "App":
    """The app with a model of its own; in this process, or in a replica."""
    from twotower.serve.app import create_app

    loaded = load_with_bar(placement_of(options), only_decodes=True)
    worker = Worker(loaded.model, loaded.tokenizer, options)
    served = describe(loaded, options, options.model_name)
    return create_app(worker, options, served, keys)


@contextlib.contextmanager
def need_extra(verb: str) -> Iterator[None]:
    """ValueError for a library that is missing inside."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("twotower"):
            raise
        raise ValueError(f"twotower {verb} needs {error.name}; pip install '.[serve]'") from None


def describe(
    loaded: Loaded, options: TemplateOptions = TemplateOptions(), name: str | None = None
) -> "Served":
    """The model as its callers see it, by a name and template; ValueError without a tokenizer."""
    from twotower.serve.requests import Served

    model, tokenizer = loaded.model, loaded.need_tokenizer()
    defaults = resolve_options(GenerateOptions(), defaults_of(model))
    modes = MODES if model.has_denoiser else MODES_OF_BACKBONES
    return Served(
        name=name or served_name(loaded),
        created=int((loaded.folder / "config.json").stat().st_mtime),
        tokenizer=tokenizer,
        block_size=model.config.block_size,
        modes=modes,
        default_mode=defaults.mode,
        defaults={name: getattr(defaults, name) for name in _shown(modes)},
        template=template_of(loaded, options.chat_template, options.variables),
        about=_ABOUT if loaded.name == SHIPPED else None,
        notice=functools.partial(prompt_notice, model),
    )


def _shown(modes: tuple[Mode, ...]) -> list[str]:
    """The fields that any of these modes uses."""
    unused = DENOISER_ONLY if modes == MODES_OF_BACKBONES else ()
    used = [name for name in _SHOWN if not {*modes}.isdisjoint(FIELD_MODES.get(name, MODES))]
    return [name for name in used if name not in unused]


def served_name(loaded: Loaded) -> str:
    """What callers name the model: the end of its path or id."""
    if loaded.name == SHIPPED:
        return "twotower"
    file = Path(loaded.name)
    return file.stem if file.suffix.lower() == ".gguf" else file.name


def template_of(
    loaded: Loaded, instead: Path | None, variables: Mapping[str, object]
) -> "ChatTemplate | None":
    """The given template, the checkpoint's, or for the shipped model the plain one; ValueError (one
    line) for variables where there is none.
    """
    from twotower.serve.chat import plain_template, read_template

    if loaded.name == SHIPPED and instead is None:
        found: ChatTemplate | None = plain_template(loaded.need_tokenizer())
    else:
        found = read_template(loaded.folder, instead)
    if found is None and variables:
        raise ValueError(f"chat_template_kwargs: {loaded.name} has no chat template; leave it out")
    return found and replace(found, variables=variables)
