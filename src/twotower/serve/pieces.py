"""Texts that come in pieces: which calls and which tokens of them can be given out."""

import codecs
import itertools
from collections.abc import Sequence

from twotower.engine import Completion
from twotower.engine.events import TokenLogprob
from twotower.serve.tool_calls import CallReader, ToolStyle, ToolText, read_tool_calls
from twotower.tokenizer import Tokenizer

Logprobs = Sequence[TokenLogprob] | None
# Of a text that is given: its first token has no probability.
Scores = Sequence[TokenLogprob | int]
Placed = list[tuple[TokenLogprob | int, int]]  # each with the character at which it begins


class Replies:
    """The replies of one answer as text and calls, whole or while they come."""

    def __init__(self, style: ToolStyle | None, strips_reply: bool) -> None:
        """style: how calls are written, None where there are no tools. strips_reply: whether a
        reply's first blank belongs to the format.
        """
        self._style, self._strips = style, strips_reply
        self._has_text: set[int] = set()  # replies whose text has begun
        self._readers: dict[int, CallReader] = {}

    def whole(self, completion: Completion) -> ToolText:
        """All of a reply."""
        text = completion.text or ""
        text = text.lstrip() if self._strips else text
        if self._style is None:
            return ToolText(text)
        return read_tool_calls(text, self._style, _is_cut(completion))

    def push(self, index: int, text: str) -> ToolText:
        """What the next characters of a reply make known."""
        if self._strips and index not in self._has_text:
            text = text.lstrip()
        if text:
            self._has_text.add(index)
        return ToolText(text) if self._style is None else self._reader(index).push(text)

    def close(self, index: int, completion: Completion) -> ToolText:
        """What its end makes known."""
        return ToolText() if self._style is None else self._reader(index).close(_is_cut(completion))

    def _reader(self, index: int) -> CallReader:
        assert self._style is not None
        return self._readers.setdefault(index, CallReader(self._style))


def _is_cut(completion: Completion) -> bool:
    """Whether a text has not ended by itself."""
    return completion.finish_reason != "eos"


class PlacedTokens:
    """The tokens of one text with their log-probabilities, each given out with the character that
    it begins: text may wait for its whole characters, or because it may become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = self._num_shown = 0
        self._held: Placed = []

    def push(self, text: str, logprobs: Scores) -> Placed:
        """The tokens of what can be seen now: of new text, and of those that came before it."""
        self._num_shown += len(text)
        for one in logprobs:
            self._held.append((one, self._place(one if isinstance(one, int) else one.token)))
        count = sum(1 for _ in itertools.takewhile(self._is_shown, self._held))
        shown, self._held = self._held[:count], self._held[count:]
        return shown

    def close(self, completion: Completion) -> Placed:
        """What is left at the end; a stop string and what follows it is no part of the text."""
        rest, self._held = self._held, []
        return [] if completion.finish_reason == "stop" else rest

    def _is_shown(self, placed: tuple[TokenLogprob | int, int]) -> bool:
        return placed[1] < self._num_shown

    def _place(self, token: int) -> int:
        """The character in which a token begins: a part of one stands where the whole will."""
        data = self._tokenizer.token_bytes(token)
        if token in self._tokenizer.special_ids or not data:
            return self._num_chars
        num_first = len(self._decoder.decode(data[:1]))
        is_open = bool(self._decoder.getstate()[0])
        place = self._num_chars + num_first - (not is_open)
        self._num_chars += num_first + len(self._decoder.decode(data[1:]))
        return place
