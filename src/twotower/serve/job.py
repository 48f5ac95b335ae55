"""A validated body into rows for the engine: prompts as ids, decoding options, limits."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twotower.engine import GenerateOptions, Mode, Request
from twotower.engine.options import FIELD_MODES
from twotower.serve.errors import ApiError, bad_value
from twotower.serve.fields import Decoding
from twotower.serve.options import ServeOptions
from twotower.serve.schema import ChatRequest, CompletionRequest
from twotower.serve.served import Served
from twotower.serve.structure import structure_of
from twotower.serve.turns import encode_chat

# Decoding options that a body may name; one that its mode does not use is an error.
_NAMED = ("temperature", "top_p", "top_k", "stop", "ignore_eos", *FIELD_MODES)
_SEEDS = 1 << 63


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request's rows: `num_choices` for each prompt, in the order of their prompts."""

    requests: tuple[Request, ...]
    prompts: tuple[tuple[int, ...], ...]
    num_choices: int
    mode: Mode
    deadline_s: float
    wants_steps: bool

    @property
    def has_grammar(self) -> bool:
        """Whether submitting it may take long: a grammar is to be made."""
        return self.requests[0].options.grammar is not None


def completion_job(body: CompletionRequest, served: Served, options: ServeOptions) -> Job:
    """Rows of /v1/completions. ApiError or ValueError (one line) for what cannot be asked."""
    prompts = [_ids(prompt, served) for prompt in _prompts(body.prompt)]
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400,
            "echo: the prompt's own log-probabilities are not supported; leave out echo or "
            "logprobs",
            param="echo",
        )
    extra: dict[str, object] = {}
    if body.logprobs is not None:
        extra["logprobs"] = body.logprobs
    return _job(body, body.max_tokens, prompts, extra, served, options)


def chat_job(body: ChatRequest, served: Served, options: ServeOptions) -> Job:
    """Rows of /v1/chat/completions. ApiError or ValueError (one line) likewise."""
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise ApiError(
            400, "max_tokens: give it or max_completion_tokens, not both", param="max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
    extra: dict[str, object] = {}
    if body.logprobs:
        extra["logprobs"] = body.top_logprobs or 0
    prompt = encode_chat(body, served)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _job(body, limit, [prompt], extra, served, options)


def _job(
    body: Decoding,
    max_tokens: int | None,
    prompts: Sequence[list[int]],
    extra: dict[str, object],
    served: Served,
    options: ServeOptions,
) -> Job:
    _check_model(body, served)
    _check_stream(body)
    num_choices = body.n or 1
    _check_sizes(body, max_tokens, prompts, options)
    grammar = structure_of(body, served)
    if grammar is not None:
        extra["grammar"] = grammar
    mode = _mode(body, served, needs_order=grammar is not None)
    given = _given(body, served) | extra | {"mode": mode}
    default = served.defaults["max_new_tokens"]
    assert isinstance(default, int)
    if max_tokens is not None or default > options.max_new_tokens:
        given["max_new_tokens"] = max_tokens or options.max_new_tokens
    first_seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed
    try:
        choices = [
            GenerateOptions(**given, seed=(first_seed + choice) % _SEEDS)  # type: ignore[arg-type]
            for choice in range(num_choices)
        ]
    except ValueError as error:
        raise bad_value(error) from None
    return Job(
        requests=tuple(Request(prompt, choice) for prompt in prompts for choice in choices),
        prompts=tuple(map(tuple, prompts)),
        num_choices=num_choices,
        mode=mode,
        deadline_s=min(options.deadline_s, body.deadline_s or options.deadline_s),
        wants_steps=bool(body.twotower_events),
    )


def _mode(body: Decoding, served: Served, needs_order: bool) -> Mode:
    """The mode asked for, or the default; where the default cannot follow a grammar, speculative.

    A mode that was asked for and cannot is refused by the engine, with the reason.
    """
    if body.mode is None:
        is_able = not needs_order or served.default_mode in ("ar", "speculative")
        mode: Mode = served.default_mode if is_able else "speculative"
    else:
        mode = body.mode
    if mode not in served.modes:
        raise ApiError(
            400,
            f"mode: {mode} is not offered by this server; use one of {', '.join(served.modes)}",
            param="mode",
        )
    return mode


def _given(body: Decoding, served: Served) -> dict[str, object]:
    """The decoding options that the body names."""
    given = {name: getattr(body, name) for name in _NAMED if name in Decoding.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    if not given.get("temperature", served.defaults["temperature"]):
        for name in ("top_k", "top_p"):  # OpenAI's clients send them with temperature 0, too
            given.pop(name, None)
    return given


def _prompts(prompt: object) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    assert isinstance(prompt, list)
    return [prompt] if isinstance(prompt[0], int) else prompt


def _ids(prompt: str | list[int], served: Served) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    tokenizer = served.tokenizer
    return tokenizer.encode(prompt, add_bos=tokenizer.bos_id is not None)


def _check_model(body: Decoding, served: Served) -> None:
    if body.model not in (None, served.name):
        raise ApiError(
            404,
            f"model: {body.model!r} is not served here; use {served.name!r}",
            param="model",
            code="model_not_found",
        )


def _check_stream(body: Decoding) -> None:
    for name in ("stream_options", "twotower_events"):
        if getattr(body, name) and not body.stream:
            raise ApiError(400, f"{name}: needs stream to be true", param=name)


def _check_sizes(
    body: Decoding, max_tokens: int | None, prompts: Sequence[list[int]], options: ServeOptions
) -> None:
    num_rows, longest = len(prompts) * (body.n or 1), max(map(len, prompts))
    sizes: Mapping[str, tuple[int, int]] = {
        "n": (num_rows, options.max_rows_per_request),
        "max_tokens": (max_tokens or 0, options.max_new_tokens),
        "block_size": (body.block_size or 0, options.max_block_size),
        "steps_per_block": (body.steps_per_block or 0, options.max_steps_per_block),
        "draft_passes": (body.draft_passes or 0, options.max_steps_per_block),
    }
    if longest > options.max_prompt_tokens:
        raise ApiError(
            400,
            f"prompt: has {longest} tokens; this server reads at most {options.max_prompt_tokens}",
            param="prompt",
            code="context_length_exceeded",
        )
    for name, (asked, most) in sizes.items():
        if asked > most:
            what = f"{asked} rows (prompts times n)" if name == "n" else str(asked)
            message = f"{name}: {what} is more than this server allows; at most {most}"
            raise ApiError(400, message, param=name, code="too_large")
