"""Answers in OpenAI's shape, and their usage."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator

import pytest

from tiny_text import byte_tokenizer, tiny_tokenizer
from twotower.engine import (
    Completion,
    Event,
    Finished,
    GenerateOptions,
    Request,
    StepTaken,
    TokenLogprob,
    TokensCommitted,
)
from twotower.serve.answers import ChatShape, CompletionShape, usage_of
from twotower.serve.metrics import Entry, RateLimit
from twotower.serve.pieces import Replies
from twotower.serve.requests import Generation
from twotower.serve.service import _merged, whole_to_json
from twotower.serve.tool_calls import BARE, HERMES

TOKENIZER = tiny_tokenizer()


def completion(**given: object) -> Completion:
    values = {"tokens": [5, 6], "text": "ab", "nfe": 2, "context_forwards": 3}
    return Completion(**{**values, "finish_reason": "eos", **given})  # type: ignore[arg-type]


def test_a_probability_of_zero_is_still_json() -> None:
    """Guards against an answer that fails when a log-probability is minus infinity."""
    never = float("-inf")
    logprobs = tuple(
        TokenLogprob(token=token, logprob=logprob, top=((6, never),))
        for token, logprob in ((5, -0.5), (6, never))
    )
    texts = CompletionShape("m", TOKENIZER, ["P"], has_logprobs=True)
    chat = ChatShape("m", TOKENIZER, Replies(None, False))
    for shape in (texts, chat):
        whole = shape.whole([completion(logprobs=logprobs)], {})
        assert "-9999.0" in json.dumps(whole, allow_nan=False)


def test_parts_of_a_character_have_names_and_bytes_of_their_own() -> None:
    """Silent failure: three tokens of one character are all U+FFFD, and only one of two
    alternatives of that name is left.
    """
    tokenizer = byte_tokenizer()
    first, *_ = ids = tokenizer.encode("\u20ac")
    assert len(ids) == 3
    tops = ((first, -0.1), (ids[1], -2.5))
    logprobs = tuple(TokenLogprob(token=token, logprob=-0.1, top=tops) for token in ids)
    chat = ChatShape("m", tokenizer, Replies(None, False))
    (choice,) = chat.whole([completion(tokens=ids, logprobs=logprobs)], {})["choices"]  # type: ignore[misc]
    shown = choice["logprobs"]["content"]
    assert [byte for one in shown for byte in one["bytes"]] == list("\u20ac".encode())
    assert [one["token"] for one in shown] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    texts = CompletionShape("m", tokenizer, [""], has_logprobs=True)
    after = (*logprobs, *logprobs[:1])
    (choice,) = texts.whole([completion(tokens=ids, logprobs=after)], {})["choices"]  # type: ignore[misc]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1]


def test_a_token_is_given_out_with_the_character_that_it_begins() -> None:
    """Silent failure: offsets beyond the text, or of other characters, where bytes form none or a
    stop string ends the text; and a stream that tells other tokens than the whole answer.
    """
    tokenizer = byte_tokenizer()
    first, _, third = tokenizer.encode("\u20ac")
    letters = [tokenizer.encode(letter)[0] for letter in "ab"]
    ids = [first, letters[0], third, *tokenizer.encode("\u20ac"), letters[1], *letters]
    logprobs = tuple(TokenLogprob(token=token, logprob=-0.1, top=()) for token in ids)
    places = [0, 1, 2, 3, 3, 3, 4, 5, 6]
    text = "\ufffda\ufffd\u20acb"  # and the stop string "ab"
    for reason, shown in (("stop", 7), ("length", 9)):
        ended = completion(text=text, logprobs=logprobs, finish_reason=reason)
        shape = CompletionShape("m", tokenizer, [""], has_logprobs=True)
        (choice,) = shape.whole([ended], {})["choices"]  # type: ignore[misc]
        assert choice["logprobs"]["text_offset"] == places[:shown]
        chat = ChatShape("m", tokenizer, Replies(None, False))
        (choice,) = chat.whole([ended], {})["choices"]  # type: ignore[misc]
        assert len(choice["logprobs"]["content"]) == shown
        shape = CompletionShape("m", tokenizer, [""], has_logprobs=True)
        pieces = (("", logprobs[:1]), ("\ufffda", logprobs[1:4]), (text[2:], logprobs[4:]))
        chunks = [one for piece in pieces for one in shape.text(0, *piece)] + shape.end(0, ended)
        found = [c["choices"][0]["logprobs"] for c in chunks]  # type: ignore[index]
        assert [p for one in found if one for p in one["text_offset"]] == places[:shown]
        assert [len(one["tokens"]) if one else 0 for one in found] == [2, 5, shown - 7]


def test_alternatives_that_are_written_alike_have_names_of_their_own() -> None:
    """Silent failure: of two tokens of one name a dictionary keeps the last."""
    tokenizer = byte_tokenizer()
    (token,) = tokenizer.encode("a")
    twice = TokenLogprob(token=token, logprob=-0.1, top=((token, -0.1), (token, -0.7)))
    shape = CompletionShape("m", tokenizer, [""], has_logprobs=True)
    (choice,) = shape.whole([completion(tokens=[token], text="a", logprobs=(twice,))], {})[
        "choices"
    ]  # type: ignore[misc]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.1, f"token_id:{token}": -0.7}]


def test_calls_and_text_around_them_are_taken_apart() -> None:
    shape = ChatShape("m", TOKENIZER, Replies(HERMES, False))
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1.50}}\n</tool_call>'
    written = completion(text=f"Wait. {call}{call}")
    choice = shape.whole([written], {})["choices"][0]  # type: ignore[index]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Wait."
    calls = choice["message"]["tool_calls"]
    assert [one["function"] for one in calls] == [{"name": "f", "arguments": '{"x": 1.50}'}] * 2
    assert calls[0]["id"] != calls[1]["id"]
    chunks = [
        *shape.begin(0),
        *(
            one
            for piece in (f"Wait. {call[:20]}", call[20:] + call)
            for one in shape.text(0, piece, None)
        ),
        *shape.end(0, written),
    ]
    found = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    assert [one["delta"].get("content") for one in found] == ["", "Wait.", None, None, None]
    assert [one["delta"]["tool_calls"][0]["index"] for one in found[2:4]] == [0, 1]
    # The reason comes alone: clients end the last call with the chunk after it.
    assert found[4]["delta"] == {} and found[4]["finish_reason"] == "tool_calls"
    assert [one["finish_reason"] for one in found[:4]] == [None] * 4


def test_a_cut_call_is_no_text() -> None:
    shape = ChatShape("m", TOKENIZER, Replies(HERMES, False))
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1.50}}\n</tool_call>'
    (choice,) = shape.whole([completion(text=call[:-15], finish_reason="length")], {})["choices"]  # type: ignore[misc]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": '{"x": 1.50',
    }


def test_a_replys_first_blanks_belong_to_the_format() -> None:
    shape = ChatShape("m", TOKENIZER, Replies(None, True))
    chunks = [one for text in (" ", " a", " b") for one in shape.text(0, text, None)]
    deltas = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]  # type: ignore[index]
    assert deltas == ["a", " b"]


def test_prompts_count_once_and_cached_tokens_are_those_of_all_choices() -> None:
    """Guards against n choices that are billed n prompts, or find themselves in the cache."""
    first, second = (Request(prompt, GenerateOptions()) for prompt in ([1, 2, 3], [4, 5]))
    asked = Generation(
        prompts=([1, 2, 3], [4, 5]),
        requests=(first, first, second, second),
        num_choices=2,
        mode="ar",
        ends_s=1.0,
        wants_steps=False,
    )
    usage = usage_of(asked, [completion(cached_tokens=n) for n in (0, 3, 2, 2)])
    assert usage == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 2},
        "nfe": 8,
        "context_forwards": 12,
        "tokens_per_nfe": 1.0,
    }
    without = [completion(nfe=0) for _ in range(4)]
    assert usage_of(asked, without)["tokens_per_nfe"] is None


def test_a_line_of_the_log_is_one_line() -> None:
    """Guards against callers who write lines, fields or terminal commands of their own."""
    entry = Entry(a="plain", b="two words", c="x\ny=1", d="\x1b[2J", e=3, f="")
    assert entry.line() == r"a=plain b='two words' c='x\ny=1' d='\x1b[2J' e=3 f=''"


def test_a_value_in_the_log_is_short() -> None:
    assert len(Entry(path="/" + "a" * 64_000).line()) < 400


def test_lines_come_no_faster_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the disk: whoever can cause a line can cause millions."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    limit = RateLimit(burst=3, lines_a_second=1.0)

    def passes() -> str | None:
        record = logging.LogRecord("n", logging.INFO, "f", 1, "line %d", (7,), None)
        return record.getMessage() if limit.filter(record) else None

    assert [passes() for _ in range(5)] == ["line 7"] * 3 + [None] * 2
    now[0] += 1.5
    assert passes() == "line 7 (2 lines before were left out)"
    assert passes() is None


def test_a_whole_answer_is_the_same_json_piece_by_piece() -> None:
    shape = CompletionShape('m"choices":[]', TOKENIZER, ["", ""], has_logprobs=False)
    answer = shape.whole([completion(), completion(text='[]"choices":[]é')], {"n": 1})
    assert json.loads(whole_to_json(answer)) == answer


def test_a_deep_reply_is_text_and_no_error() -> None:
    """Guards a reply that a model began with a thousand brackets."""
    shape = ChatShape("m", TOKENIZER, Replies(BARE, False))
    for depth in (50, 101, 500, 900, 5_000):
        text = '{"name": "f",  "arguments": {"a": ' + "[" * depth + "]" * depth + "}}"
        choice = shape.whole([completion(text=text)], {})["choices"][0]  # type: ignore[index]
        calls = choice["message"].get("tool_calls")
        assert (calls is not None) == (depth == 50)
        assert calls is not None or choice["message"]["content"] == text


def test_a_viewer_who_does_not_look_is_spared_steps_and_no_text() -> None:
    """Guards memory: one request can take half a million steps, which wait for a slow reader."""

    class Row:
        def cancel(self) -> None:
            """Nothing to cancel."""

        async def aevents(self) -> AsyncGenerator[Event, None]:
            for number in range(3_000):
                state = {"t": 0.5, "tokens": [1], "is_masked": [True], "confidence": [0.5]}
                yield StepTaken(row=0, block_index=0, step=number, nfe=1, **state)  # type: ignore[arg-type]
                if number % 10 == 0:
                    yield TokensCommitted(
                        row=0, block_index=0, tokens=[1], text="a", nfe=1, context_forwards=1
                    )
            yield Finished(row=0, completion=completion())

    async def hear() -> list[Event]:
        found = []
        async for _, event in _merged([Row()], {}, None):  # type: ignore[list-item]
            found.append(event)
            await asyncio.sleep(0)
        return found

    found = asyncio.run(hear())
    assert sum(isinstance(event, TokensCommitted) for event in found) == 300
    assert sum(isinstance(event, StepTaken) for event in found) < 1_000
