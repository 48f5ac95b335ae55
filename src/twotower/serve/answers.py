"""The JSON of answers: a text completion's and a chat completion's, whole or in chunks.

A shape holds what the chunks of one answer share; it keeps no text.
"""

import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Protocol

from twotower.engine import Completion
from twotower.engine.events import TokenLogprob
from twotower.serve.pieces import Logprobs, Placed, PlacedTokens, Replies, Scores
from twotower.serve.requests import Generation
from twotower.serve.tool_calls import ToolText, call_record
from twotower.tokenizer import Tokenizer

Chunks = list[dict[str, object]]
_FINISH = {"eos": "stop"}  # OpenAI's word for a text that ended by itself; the others agree


class Shape(Protocol):
    """How one endpoint writes its answer."""

    def whole(self, completions: Sequence[Completion], usage: object) -> dict[str, object]:
        """The answer in one piece."""

    def begin(self, index: int) -> Chunks:
        """What comes before a choice's text."""

    def text(self, index: int, text: str, logprobs: Logprobs) -> Chunks:
        """What of a text, and of all that came before it, is to be seen now."""

    def end(self, index: int, completion: Completion) -> Chunks:
        """What is left of a choice, and why it ended."""

    def usage(self, completions: Sequence[Completion], usage: object) -> Chunks:
        """What comes after all choices."""


class CompletionShape:
    """`text_completion` objects."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        echo: Sequence[str],
        has_logprobs: bool,
        scores: Sequence[Scores] = (),
    ) -> None:
        """echo: what stands before each choice's text. scores: of each, with log-probabilities."""
        self._head = _head("cmpl", "text_completion", model)
        self._tokenizer = tokenizer
        self._echo = echo
        self._scores = scores or [()] * len(echo)
        self._has_logprobs = has_logprobs
        self._placed = [PlacedTokens(tokenizer) for _ in echo]

    def whole(self, completions: Sequence[Completion], usage: object) -> dict[str, object]:
        choices = []
        for index, completion in enumerate(completions):
            text = self._echo[index] + (completion.text or "")
            logprobs = [*self._scores[index], *(completion.logprobs or ())]
            tokens = self._placed[index].push(text, logprobs)
            tokens += self._placed[index].close(completion)
            choices.append(self._choice(index, text, tokens, _reason(completion)))
        return {**self._head, "choices": choices, "usage": usage}

    def begin(self, index: int) -> Chunks:
        if not self._echo[index]:
            return []
        tokens = self._placed[index].push(self._echo[index], self._scores[index])
        return self._chunk(self._choice(index, self._echo[index], tokens, None))

    def text(self, index: int, text: str, logprobs: Logprobs) -> Chunks:
        tokens = self._placed[index].push(text, logprobs or ())
        return self._chunk(self._choice(index, text, tokens, None)) if text or tokens else []

    def end(self, index: int, completion: Completion) -> Chunks:
        tokens = self._placed[index].close(completion)
        return self._chunk(self._choice(index, "", tokens, _reason(completion)))

    def usage(self, completions: Sequence[Completion], usage: object) -> Chunks:
        return [{**self._head, "choices": [], "usage": usage}]

    def _chunk(self, choice: dict[str, object]) -> Chunks:
        return [{**self._head, "choices": [choice]}]

    def _choice(
        self, index: int, text: str, tokens: Placed, reason: str | None
    ) -> dict[str, object]:
        shown = self._logprobs(tokens) if self._has_logprobs and tokens else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, tokens: Placed) -> dict[str, object]:
        logprobs, offsets = zip(*tokens, strict=True)
        ids = [one if isinstance(one, int) else one.token for one in logprobs]
        known = [None if isinstance(one, int) else one for one in logprobs]
        return {
            "tokens": [token_name(self._tokenizer, token) for token in ids],
            "token_logprobs": [one and _finite(one.logprob) for one in known],
            "top_logprobs": [one and (self._top(one) or None) for one in known],
            "text_offset": list(offsets),
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """Alternatives by name; of tokens that are written alike, the later ones by number."""
        named: dict[str, float] = {}
        for token, value in logprob.top:
            name = token_name(self._tokenizer, token)
            named[f"token_id:{token}" if name in named else name] = _finite(value)
        return named


class ChatShape:
    """`chat.completion` objects."""

    def __init__(self, model: str, tokenizer: Tokenizer, replies: Replies) -> None:
        self._head = _head("chatcmpl", "chat.completion.chunk", model)
        self._tokenizer, self._replies = tokenizer, replies
        self._num_calls: Counter[int] = Counter()  # of each choice
        self._placed: defaultdict[int, PlacedTokens] = defaultdict(lambda: PlacedTokens(tokenizer))

    def whole(self, completions: Sequence[Completion], usage: object) -> dict[str, object]:
        choices = [self._whole(index, one) for index, one in enumerate(completions)]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage}

    def _whole(self, index: int, completion: Completion) -> dict[str, object]:
        taken = self._replies.whole(completion)
        message: dict[str, object] = {"role": "assistant", "content": taken.content}
        if taken.calls:
            calls = list(map(call_record, taken.calls))
            message |= {"content": taken.content or None, "tool_calls": calls}
        placed, logprobs = PlacedTokens(self._tokenizer), completion.logprobs
        tokens = placed.push(completion.text or "", logprobs or ()) + placed.close(completion)
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else self._logprobs(tokens),
            "finish_reason": _reason(completion, bool(taken.calls) and not taken.is_cut),
        }

    def begin(self, index: int) -> Chunks:
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)]

    def text(self, index: int, text: str, logprobs: Logprobs) -> Chunks:
        tokens = self._placed[index].push(text, logprobs or ())
        return self._shown(index, self._replies.push(index, text), tokens)

    def end(self, index: int, completion: Completion) -> Chunks:
        rest = self._replies.close(index, completion)
        chunks = self._shown(index, rest, self._placed[index].close(completion))
        has_called = self._num_calls[index] > 0 and not rest.is_cut
        # Of its own: clients close what they gather of a call when a chunk has no more of it.
        return [*chunks, self._chunk(index, {}, None, _reason(completion, has_called))]

    def usage(self, completions: Sequence[Completion], usage: object) -> Chunks:
        return [{**self._head, "choices": [], "usage": usage}]

    def _shown(self, index: int, taken: ToolText, tokens: Placed) -> Chunks:
        chunks = []
        if taken.content or tokens:
            chunks.append(self._chunk(index, {"content": taken.content}, tokens, None))
        for call in taken.calls:
            record = {"index": self._num_calls[index], **call_record(call)}
            chunks.append(self._chunk(index, {"tool_calls": [record]}, None, None))
            self._num_calls[index] += 1
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, object], tokens: Placed | None, reason: str | None
    ) -> dict[str, object]:
        shown = self._logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return {**self._head, "choices": [choice]}

    def _logprobs(self, tokens: Placed) -> dict[str, object]:
        content = [
            {
                **self._named(one.token, one.logprob),
                "top_logprobs": [self._named(token, value) for token, value in one.top],
            }
            for one, _ in tokens
            if not isinstance(one, int)
        ]
        return {"content": content, "refusal": None}

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


def _reason(completion: Completion, has_called: bool = False) -> str:
    if has_called:
        return "tool_calls"
    return _FINISH.get(completion.finish_reason, completion.finish_reason)


def _head(prefix: str, kind: str, model: str) -> dict[str, object]:
    number = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": model}


NOTHING = Completion(tokens=[], text="", nfe=0, context_forwards=0, finish_reason="length")


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
