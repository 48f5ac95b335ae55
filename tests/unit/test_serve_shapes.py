"""Answers in OpenAI's shape, and their usage."""

import json

from tiny_text import tiny_tokenizer
from twotower.engine import Completion, GenerateOptions, Request, TokenLogprob
from twotower.serve.job import Job
from twotower.serve.observe import Entry
from twotower.serve.shapes import ChatShape, CompletionShape
from twotower.serve.tool_calls import HERMES
from twotower.serve.usage import usage_of

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
    chat = ChatShape("m", TOKENIZER, None, strips_reply=False)
    for shape in (texts, chat):
        whole = shape.whole([completion(logprobs=logprobs)], {})
        assert "-9999.0" in json.dumps(whole, allow_nan=False)


def test_calls_and_text_around_them_are_taken_apart() -> None:
    shape = ChatShape("m", TOKENIZER, HERMES, strips_reply=False)
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1.50}}\n</tool_call>'
    written = completion(text=f"Wait. {call}{call}")
    choice = shape.whole([written], {})["choices"][0]  # type: ignore[index]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Wait."
    calls = choice["message"]["tool_calls"]
    assert [one["function"] for one in calls] == [{"name": "f", "arguments": '{"x": 1.50}'}] * 2
    assert calls[0]["id"] != calls[1]["id"]
    assert shape.text(0, "Wait.", None) is None, "half a call was shown"
    delta = shape.end(0, written)["choices"][0]["delta"]  # type: ignore[index]
    assert [one["index"] for one in delta["tool_calls"]] == [0, 1]
    cut = shape.whole([completion(text=call[:30], finish_reason="length")], {})
    choice = cut["choices"][0]  # type: ignore[index]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == call[:30]


def test_a_replys_first_blanks_belong_to_the_format() -> None:
    shape = ChatShape("m", TOKENIZER, None, strips_reply=True)
    chunks = [shape.text(0, text, None) for text in (" ", " a", " b")]
    assert chunks[0] is None
    deltas = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:] if chunk]  # type: ignore[index]
    assert deltas == ["a", " b"]


def test_prompts_count_once_and_cached_tokens_are_those_of_all_choices() -> None:
    """Guards against n choices that are billed n prompts, or find themselves in the cache."""
    request = Request([1, 2, 3], GenerateOptions())
    job = Job(
        requests=(request,) * 4,
        prompts=((1, 2, 3), (4, 5)),
        num_choices=2,
        mode="ar",
        deadline_s=1.0,
        wants_steps=False,
    )
    usage = usage_of(job, [completion(cached_tokens=n) for n in (0, 3, 2, 2)])
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
    assert usage_of(job, without)["tokens_per_nfe"] is None


def test_a_line_of_the_log_is_one_line() -> None:
    """Guards against callers who write lines, fields or terminal commands of their own."""
    entry = Entry(a="plain", b="two words", c="x\ny=1", d="\x1b[2J", e=3, f="")
    assert entry.line() == r"a=plain b='two words' c='x\ny=1' d='\x1b[2J' e=3 f=''"
