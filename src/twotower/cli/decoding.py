"""The decoding options as flags, one set for the verbs that write text. A verb leaves out what
means nothing in it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, TypedDict, get_args, get_type_hints

import tyro

from twotower.checkpoint import has_denoiser
from twotower.cli.flags import aliases_of, with_flags
from twotower.cli.prompts import read_argument
from twotower.documented import field_docs
from twotower.engine import MODES, GenerateOptions, ResolvedOptions
from twotower.engine.request import require_denoiser
from twotower.engine.resolved import FIELD_MODES
from twotower.loading import Placement

_DOCS = field_docs(GenerateOptions)
_FIRST = ("mode", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos")
# What is repeatable tyro cannot combine with "not given"; a grammar is a file of its own.
_OTHERWISE = ("stop", "logit_bias", "eos_token_id", "grammar")


def decoding_flags(*leave_out: str) -> type:
    """What a verb's field `decoding` is annotated with: a dictionary type of all options but some,
    of which only those that are given come back. Types, help and defaults are those of the library.
    """
    hints = get_type_hints(ResolvedOptions)
    flags: dict[str, object] = {}
    aliases = aliases_of(ResolvedOptions)
    fields = {field.name: field.default for field in dataclasses.fields(ResolvedOptions)}
    for name in dict.fromkeys((*_FIRST, *fields)):
        if name not in (*_OTHERWISE, *leave_out):
            is_typed = fields[name] is not None and fields[name] is not False
            shown = tyro.conf.arg(
                aliases=aliases.get(name),
                help=with_flags(_DOCS[name], hints),
                help_behavior_hint=f"(default: {fields[name]})" if is_typed else "",
            )
            hint = hints[name]
            if NoneType in get_args(hint):  # which is not to be given
                (hint,) = {*get_args(hint)} - {NoneType}
            flags[name] = Annotated[hint, shown]
    # Made at run time, so there is nothing for a type checker to see.
    return TypedDict("decoding", flags, total=False)  # type: ignore[operator, no-any-return]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What the text may be, and where it ends."""

    stop: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="TEXT", help=_DOCS["stop"]),
    ] = ()
    logit_bias: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="ID=BIAS", help=_DOCS["logit_bias"]),
    ] = ()
    eos_token_id: Annotated[
        tuple[int, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="INT", help=_DOCS["eos_token_id"]),
    ] = ()

    def named(self, decoding: Mapping[str, object], is_escaped: bool) -> dict[str, object]:
        """The decoding options that were named, here and by other flags."""
        found = dict(decoding)
        if self.stop:
            found["stop"] = tuple(read_argument(text, "--stop", is_escaped) for text in self.stop)
        if self.eos_token_id:
            found["eos_token_id"] = self.eos_token_id
        if self.logit_bias:
            found["logit_bias"] = dict(map(_bias, self.logit_bias))
        return found


def by_mode(modes: Iterable[str], named: Mapping[str, object]) -> dict[str, GenerateOptions]:
    """Options of each mode: of those that were named, the ones that it uses."""
    return {
        mode: GenerateOptions(
            mode=mode,  # type: ignore[arg-type]  # checked by __post_init__, as all others
            **{n: value for n, value in named.items() if mode in FIELD_MODES.get(n, MODES)},  # type: ignore[arg-type]
        )
        for mode in modes
    }


def refuse_without_denoiser(placement: Placement, options: GenerateOptions) -> None:
    """ValueError, before weights are loaded, for a mode or drafts without the tower they need."""
    asked = ResolvedOptions(mode=options.mode or "speculative", drafts=options.drafts or "auto")
    require_denoiser(has_any_denoiser(placement), asked)


def has_any_denoiser(placement: Placement) -> bool:
    """Whether a model that is to be loaded will have a denoiser."""
    return placement.denoiser is not None or has_denoiser(placement.find())


def _bias(pair: str) -> tuple[str, object]:
    token, _, bias = pair.partition("=")
    try:
        return str(int(token)), float(bias)
    except ValueError:
        raise ValueError(
            f"logit_bias={pair!r} must be a token id, = and a number, such as 42=-100"
        ) from None
