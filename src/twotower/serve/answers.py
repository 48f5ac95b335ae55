"""The JSON of answers: a text completion's and a chat completion's, whole or in chunks.

A shape holds what the chunks of one answer share; it keeps no text.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Protocol

from twotower.engine import Completion, StepTaken, Ticket, TokensCommitted
from twotower.engine.events import TokenLogprob
from twotower.serve.requests import Generation
from twotower.serve.tool_calls import ToolStyle, split_calls
from twotower.tokenizer import Tokenizer

Calls = list[dict[str, object]]
Logprobs = Sequence[TokenLogprob] | None
_FINISH = {"eos": "stop"}  # OpenAI's word for a text that ended by itself; the others agree


class Shape(Protocol):
    """How one endpoint writes its answer."""

    def whole(self, completions: Sequence[Completion], usage: object) -> dict[str, object]:
        """The answer in one piece."""

    def begin(self, index: int) -> dict[str, object] | None:
        """A choice's first chunk, if it has one before its text."""

    def text(self, index: int, text: str, logprobs: Logprobs) -> dict[str, object] | None:
        """A chunk of text, if it is to be seen now."""

    def end(self, index: int, completion: Completion) -> dict[str, object]:
        """A choice's last chunk."""

    def usage(self, usage: object) -> dict[str, object]:
        """The chunk after all choices."""


class CompletionShape:
    """`text_completion` objects."""

    def __init__(
        self, model: str, tokenizer: Tokenizer, echo: Sequence[str], has_logprobs: bool
    ) -> None:
        """echo: what stands before each choice's text."""
        self._head = _head("cmpl", "text_completion", model)
        self._tokenizer = tokenizer
        self._echo = echo
        self._has_logprobs = has_logprobs
        self._offset = dict.fromkeys(range(len(echo)), 0)  # characters of each choice so far
        self._streams = {index: tokenizer.stream() for index in self._offset}

    def whole(self, completions: Sequence[Completion], usage: object) -> dict[str, object]:
        choices = [
            self._choice(
                index,
                self._echo[index] + (completion.text or ""),
                completion.logprobs,
                _FINISH.get(completion.finish_reason, completion.finish_reason),
            )
            for index, completion in enumerate(completions)
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def begin(self, index: int) -> dict[str, object] | None:
        return self.text(index, self._echo[index], None) if self._echo[index] else None

    def text(self, index: int, text: str, logprobs: Logprobs) -> dict[str, object] | None:
        return {**self._head, "choices": [self._choice(index, text, logprobs, None)]}

    def end(self, index: int, completion: Completion) -> dict[str, object]:
        reason = _FINISH.get(completion.finish_reason, completion.finish_reason)
        return {**self._head, "choices": [self._choice(index, "", None, reason)]}

    def usage(self, usage: object) -> dict[str, object]:
        return {**self._head, "choices": [], "usage": usage}

    def _choice(
        self, index: int, text: str, logprobs: Logprobs, reason: str | None
    ) -> dict[str, object]:
        shown = self._logprobs(index, logprobs) if self._has_logprobs and logprobs else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        offsets = []
        for one in logprobs:  # a part of a character stands where the character will
            offsets.append(self._offset[index])
            self._offset[index] += len(self._streams[index].push([one.token]))
        return {
            "tokens": [token_name(self._tokenizer, one.token) for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [
                {token_name(self._tokenizer, id_): _finite(value) for id_, value in one.top} or None
                for one in logprobs
            ],
            "text_offset": offsets,
        }


class ChatShape:
    """`chat.completion` objects; where tools may be called, a reply is sent when it is whole."""

    def __init__(
        self, model: str, tokenizer: Tokenizer, style: ToolStyle | None, strips_reply: bool
    ) -> None:
        """style: how calls are written, None where there are no tools."""
        self._head = _head("chatcmpl", "chat.completion.chunk", model)
        self._tokenizer = tokenizer
        self._style = style
        self._strips = strips_reply
        self._has_text: set[int] = set()  # choices whose text has begun

    def whole(self, completions: Sequence[Completion], usage: object) -> dict[str, object]:
        choices = [self._whole(index, one) for index, one in enumerate(completions)]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage}

    def _whole(self, index: int, completion: Completion) -> dict[str, object]:
        text, calls = self._split(completion)
        message: dict[str, object] = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        logprobs = completion.logprobs
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": _reason(completion, calls),
        }

    def begin(self, index: int) -> dict[str, object] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def text(self, index: int, text: str, logprobs: Logprobs) -> dict[str, object] | None:
        if self._style is not None:
            return None
        if self._strips and index not in self._has_text:
            text = text.lstrip()
        if text:
            self._has_text.add(index)
        elif not logprobs:
            return None
        return self._chunk(index, {"content": text}, logprobs, None)

    def end(self, index: int, completion: Completion) -> dict[str, object]:
        delta: dict[str, object] = {}
        calls: Calls = []
        logprobs = None
        if self._style is not None:
            text, calls = self._split(completion)
            logprobs = completion.logprobs
            if text or not calls:
                delta["content"] = text
            if calls:
                delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
        return self._chunk(index, delta, logprobs, _reason(completion, calls))

    def usage(self, usage: object) -> dict[str, object]:
        return {**self._head, "choices": [], "usage": usage}

    def _split(self, completion: Completion) -> tuple[str, Calls]:
        text = completion.text or ""
        return split_calls(text.lstrip() if self._strips else text, self._style)

    def _chunk(
        self, index: int, delta: dict[str, object], logprobs: Logprobs, reason: str | None
    ) -> dict[str, object]:
        shown = None if logprobs is None else self._logprobs(logprobs)
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return {**self._head, "choices": [choice]}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        content = [
            {
                **self._named(one.token, one.logprob),
                "top_logprobs": [self._named(token, value) for token, value in one.top],
            }
            for one in logprobs
        ]
        return {"content": content}

    def _named(self, token: int, logprob: float) -> dict[str, object]:
        return {
            "token": token_name(self._tokenizer, token),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; of a part of a character its bytes, in OpenAI's spelling."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's word for it is -9999."""
    return max(logprob, -9999.0)


def _reason(completion: Completion, calls: Calls) -> str:
    if calls:
        return "tool_calls"
    return _FINISH.get(completion.finish_reason, completion.finish_reason)


def _head(prefix: str, kind: str, model: str) -> dict[str, object]:
    number = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": model}


def usage_of(asked: Generation, completions: Sequence[Completion]) -> dict[str, object]:
    """Counts over all rows; prompts count once, however many choices were asked for."""
    num_prompt = sum(map(len, asked.prompts))
    num_new = sum(len(completion.tokens) for completion in completions)
    nfe = sum(completion.nfe for completion in completions)
    # With n choices, the later ones may find the first one's prompt in the cache.
    cached = [
        min(c.cached_tokens for c in completions[at : at + asked.num_choices])
        for at in range(0, len(completions), asked.num_choices)
    ]
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
        "nfe": nfe,
        "context_forwards": sum(completion.context_forwards for completion in completions),
        "tokens_per_nfe": round(num_new / nfe, 3) if nfe else None,
    }


class Viewer:
    """Block states for those who want to see blocks resolve."""

    def __init__(self, tokenizer: Tokenizer, tickets: Sequence[Ticket]) -> None:
        self._tokenizer = tokenizer
        self._tickets = tickets

    def record(self, index: int, event: object) -> dict[str, object] | None:
        """The record of a step or of a commit; None for other events."""
        match event:
            case StepTaken():
                return self._step(index, event)
            case TokensCommitted():
                return self._commit(index, event)
            case _:
                return None

    def _step(self, index: int, event: StepTaken) -> dict[str, object]:
        tokens = [
            {
                "id": None if is_masked else token,
                "text": "" if is_masked else self._tokenizer.token_text(token),
                "masked": is_masked,
                "confidence": round(confidence, 4),
            }
            for token, is_masked, confidence in zip(
                event.tokens, event.is_masked, event.confidence, strict=True
            )
        ]
        return {
            "object": "twotower.step",
            "index": index,
            "block": event.block_index,
            "step": event.step,
            "t": event.t,
            "nfe": event.nfe,
            "tokens": tokens,
            "elapsed_ms": self._elapsed_ms(index),
        }

    def _commit(self, index: int, event: TokensCommitted) -> dict[str, object]:
        return {
            "object": "twotower.commit",
            "index": index,
            "block": event.block_index,
            "tokens": [
                {"id": token, "text": self._tokenizer.token_text(token)} for token in event.tokens
            ],
            "drafted": event.drafted,
            "accepted": event.accepted,
            "rejected": event.rejected,
            "nfe": event.nfe,
            "context_forwards": event.context_forwards,
            "elapsed_ms": self._elapsed_ms(index),
        }

    def _elapsed_ms(self, index: int) -> float:
        row = self._tickets[index].row
        start_s = row.submitted_s if row.started_s is None else row.started_s
        return round((time.monotonic() - start_s) * 1000, 1)
