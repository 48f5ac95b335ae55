"""A body into rows for the engine: prompts as ids, options, a grammar, limits.

What the engine checks is not checked here: its one-line refusals are passed on.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twotower.engine import Filter, GenerateOptions, Grammar, Mode, Request
from twotower.engine.grammar import json_schema
from twotower.engine.resolved import FIELD_MODES, MODES, SAMPLED_ONLY
from twotower.serve.chat import ChatTemplate, check_length, encode_chat, encode_pieces
from twotower.serve.errors import ApiError, bad_value
from twotower.serve.options import ServeOptions
from twotower.serve.schema import (
    AllowedChoice,
    ChatRequest,
    CompletionRequest,
    Decoding,
    ResponseFormat,
    TextRequest,
)
from twotower.serve.tool_calls import Wanted, tool_call
from twotower.tokenizer import Tokenizer

# Decoding options that a body may name; one that its mode does not use is an error.
_NAMED = ("temperature", *SAMPLED_ONLY, "stop", "eos_token_id", "ignore_eos", *FIELD_MODES)
_SEEDS = 1 << 63
_MAX_LOGPROBS = 1 << 17  # values in an answer

# OpenAI's two names, and that of `GenerateOptions`.
_LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as its callers see it."""

    name: str
    created: int  # seconds since 1970
    tokenizer: Tokenizer
    block_size: int  # what it was trained with
    modes: tuple[Mode, ...]
    default_mode: Mode
    defaults: Mapping[str, Any]  # decoding options of a request that names none
    template: ChatTemplate | None
    about: str | None = None  # what it can do, for people
    notice: Callable[[Sequence[int]], str | None] | None = None  # of a prompt it cannot answer

    def card(self) -> dict[str, object]:
        """Its entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "twotower",
            "twotower": {
                "modes": list(self.modes),
                "default_mode": self.default_mode,
                "block_size": self.block_size,
                "defaults": dict(self.defaults),
                "has_chat": self.template is not None,
                "about": self.about,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one HTTP request asks of the engine: `num_choices` rows for each prompt, in the order of
    the prompts; none where nothing is to be written.
    """

    prompts: tuple[list[int], ...]
    requests: tuple[Request, ...]
    scores: tuple[Request, ...] = ()  # of each prompt, where its log-probabilities are wanted
    num_choices: int
    mode: Mode
    ends_s: float  # its deadline, in time.monotonic()
    wants_steps: bool
    caller: str = ""  # who asks

    @property
    def num_answers(self) -> int:
        """Choices of all prompts."""
        return len(self.prompts) * self.num_choices

    @property
    def seconds_left(self) -> float:
        """Until its deadline."""
        return max(0.0, self.ends_s - time.monotonic())

    @property
    def grammar(self) -> Grammar | None:
        """What every row must match."""
        return self.requests[0].options.grammar if self.requests else None


def _limit(body: TextRequest) -> int | None:
    """The maximum number of new tokens, which has several names; ApiError where they contradict."""
    names = [name for name in _LIMITS if getattr(body, name, None) is not None]
    limits = {int(getattr(body, name)) for name in names}
    if len(limits) > 1:
        message = f"{names[0]}: contradicts {names[1]}; give one of them"
        raise ApiError(400, message, param=names[0])
    return next(iter(limits), None)


class Reader:
    """Reads bodies for one server. ApiError (one line) for what cannot be asked."""

    def __init__(
        self, served: Served, options: ServeOptions, filters: tuple[Filter, ...] = ()
    ) -> None:
        self._served, self._options, self._filters = served, options, filters

    def completion(self, body: CompletionRequest, caller: str | None = None) -> Generation:
        """Of /v1/completions. caller: who asks; callers share the engine's slots."""
        self._check(body)
        texts = _prompts(body.prompt)
        self._check_rows(len(texts) * (body.n or 1))
        prompts = [self._ids(text) for text in texts]
        asked = self._generation(body, prompts, _limit(body), body.num_alternatives, caller)
        if not body.echo or body.num_alternatives is None:
            return asked
        self._check_logprobs(sum(map(len, prompts)), 1, body.num_alternatives)
        scores = [_scored(prompt, body.num_alternatives, caller) for prompt in prompts]
        return replace(asked, scores=tuple(scores))

    def chat(self, body: ChatRequest, caller: str | None = None) -> Generation:
        """Of /v1/chat/completions, likewise."""
        self._check(body)
        self._check_rows(body.n or 1)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        served, most = self._served, self._options.max_prompt_tokens
        prompt = encode_chat(body, served.name, served.template, served.tokenizer, most)
        limit = _limit(body)
        if limit == 0:
            raise ApiError(400, "max_tokens: 0 must be at least 1", param="max_tokens")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._generation(body, [prompt], limit, logprobs, caller)

    def _generation(
        self,
        body: TextRequest,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        caller: str | None,
    ) -> Generation:
        num_choices = body.n or 1
        self._check_sizes(body, max_tokens)
        self._check_logprobs(len(prompts) * num_choices, max_tokens, logprobs)
        try:
            grammar = _grammar(body, self._served.template)
            given = self._given(body)
            mode = self._mode(body, needs_order=grammar is not None or _is_penalised(given))
            given = _used(given, mode)
            given |= {"mode": mode, "logprobs": logprobs, "grammar": grammar}
            given["max_new_tokens"] = self._num_tokens(max_tokens) or 1
            seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed
            choices = [
                GenerateOptions(**given, seed=(seed + choice) % _SEEDS)  # type: ignore[arg-type]
                for choice in range(num_choices)
            ]
        except ValueError as error:
            raise bad_value(error) from None
        requests = [
            Request(prompt, choice, self._filters, caller)
            for prompt in prompts
            for choice in choices
        ]
        return Generation(
            prompts=tuple(prompts),
            requests=() if max_tokens == 0 else tuple(requests),
            num_choices=num_choices,
            mode=mode,
            ends_s=time.monotonic()
            + min(self._options.deadline_s, body.deadline_s or self._options.deadline_s),
            wants_steps=bool(body.twotower_events),
            caller=caller or "",
        )

    def _check(self, body: Decoding) -> None:
        if body.model not in (None, self._served.name):
            raise ApiError(
                404,
                f"model: {body.model!r} is not served here; use {self._served.name!r}",
                param="model",
                code="model_not_found",
            )
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        for name, is_asked in (
            ("stream_options", wants_usage),
            ("twotower_events", body.twotower_events),
        ):
            if is_asked and not body.stream:
                raise ApiError(400, f"{name}: needs stream to be true", param=name)

    def _check_rows(self, num_rows: int) -> None:
        _check_size("n", num_rows, self._options.max_rows_per_request, " rows (prompts times n)")

    def _check_sizes(self, body: Decoding, max_tokens: int | None) -> None:
        options = self._options
        for name, asked, most in (
            ("max_tokens", max_tokens, options.max_new_tokens),
            ("block_size", body.block_size, options.max_block_size),
            ("steps_per_block", body.steps_per_block, options.max_steps_per_block),
            ("draft_passes", body.draft_passes, options.max_steps_per_block),
        ):
            _check_size(name, asked or 0, most)

    def _check_logprobs(self, num_rows: int, max_tokens: int | None, logprobs: int | None) -> None:
        """An answer of them must not be of hundreds of megabytes."""
        if logprobs is not None:
            asked = num_rows * self._num_tokens(max_tokens) * (logprobs + 1)
            what = " values (rows times max_tokens times alternatives and one)"
            _check_size("logprobs", asked, _MAX_LOGPROBS, what)

    def _given(self, body: TextRequest) -> dict[str, object]:
        """The decoding options that the body names."""
        named = (name for name in _NAMED if name in TextRequest.model_fields)
        given = {name: value for name in named if (value := getattr(body, name)) is not None}
        if not given.get("temperature", self._served.defaults["temperature"]):
            # OpenAI's clients send them with temperature 0, too: they are checked and left out.
            unused = {name: given.pop(name) for name in SAMPLED_ONLY if name in given}
            GenerateOptions(**unused)
        if not given.get("stop", True):
            del given["stop"]
        return given

    def _num_tokens(self, max_tokens: int | None) -> int:
        default: int = self._served.defaults["max_new_tokens"]
        return min(default, self._options.max_new_tokens) if max_tokens is None else max_tokens

    def _ids(self, prompt: str | list[int]) -> list[int]:
        most, tokenizer = self._options.max_prompt_tokens, self._served.tokenizer
        if not isinstance(prompt, str):
            check_length(len(prompt), most)
            return prompt
        start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        return encode_pieces(tokenizer, [(prompt, False)], most, start)

    def _mode(self, body: Decoding, needs_order: bool) -> Mode:
        """The mode asked for, or the default; where the default cannot follow a grammar,
        speculative.

        A mode that was asked for and cannot is refused by the engine, with the reason.
        """
        served = self._served
        mode: Mode = body.mode or served.default_mode
        if body.mode is None and needs_order and mode not in ("ar", "speculative"):
            mode = "speculative"
        if mode not in served.modes:
            raise ApiError(
                400,
                f"mode: {mode} is not offered by this server; use one of {', '.join(served.modes)}",
                param="mode",
            )
        return mode


# Values that ask for nothing, of fields that only some modes use.
_OFF = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": {}}


def _is_penalised(given: Mapping[str, object]) -> bool:
    return any(given.get(name, off) != off for name, off in _OFF.items())


def _used(given: Mapping[str, object], mode: Mode) -> dict[str, object]:
    """What is given without what asks for nothing and the mode does not use."""
    return {
        name: value
        for name, value in given.items()
        if mode in FIELD_MODES.get(name, MODES) or name not in _OFF or value != _OFF[name]
    }


def _scored(prompt: list[int], logprobs: int, caller: str | None) -> Request:
    """A row that writes a prompt again behind its first token, for its log-probabilities."""
    options = GenerateOptions(mode="ar", logprobs=logprobs, ignore_eos=True)
    return Request(prompt[:1], options, (), caller, tuple(prompt[1:]))


def _prompts(prompt: object) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    assert isinstance(prompt, list)
    return [prompt] if isinstance(prompt[0], int) else prompt


def _check_size(name: str, asked: int, most: int, what: str = "") -> None:
    if asked > most:
        message = f"{name}: {asked}{what} is more than this server allows; at most {most}"
        raise ApiError(400, message, param=name, code="too_large")


def _grammar(body: TextRequest, template: ChatTemplate | None) -> Grammar | None:
    """What a reply must match, None for any text; ValueError for what no grammar can be made of."""
    wanted = _schema(body.response_format)
    has_choice = isinstance(body, ChatRequest) and body.tool_choice not in (None, "none", "auto")
    if isinstance(body, ChatRequest) and (body.tools or has_choice) and body.tool_choice != "none":
        return _calls(body, template, wanted)
    return None if wanted is None else json_schema(*wanted)


def _schema(wanted: ResponseFormat | None) -> Wanted | None:
    """The schema that a reply must have, and whether to the letter."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise ApiError(
            400, "response_format: type json_schema needs json_schema", param="response_format"
        )
    form = wanted.json_schema
    if form is None or form.schema_ is None:
        return {"type": "object", "additionalProperties": True}, True
    return form.schema_, form.strict is True


def _calls(body: ChatRequest, template: ChatTemplate | None, wanted: Wanted | None) -> Grammar:
    """wanted: what a reply without a call must be."""
    if not body.tools:
        raise ApiError(400, "tool_choice: needs tools", param="tool_choice")
    assert template is not None  # the prompt has been made
    choice, tools = body.tool_choice or "auto", body.tools
    if isinstance(choice, AllowedChoice):
        allowed = {tool.function.name for tool in choice.allowed_tools.tools}
        if unknown := allowed - {tool.function.name for tool in tools}:
            told = f"tool_choice: there is no tool {min(unknown)!r} among tools"
            raise ApiError(400, told, param="tool_choice")
        tools = [tool for tool in tools if tool.function.name in allowed]
        choice = choice.allowed_tools.mode
    return tool_call(
        [tool.model_dump(exclude_none=True) for tool in tools],
        choice if isinstance(choice, str) else choice.model_dump(),
        template.tool_style,
        body.parallel_tool_calls is not False,
        wanted,
    )
