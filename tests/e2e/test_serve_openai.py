"""The server behind the `openai` package: what its users rely on, with the shipped model."""

import asyncio
import json
import threading
import time

import httpx
import jsonschema
import openai
import pytest

from raw_http import wait_for
from serving import Running, shipped
from twotower.engine import GenerateOptions, generate
from twotower.engine.grammar_builder import build

SUM = "Q: How much is 48 - 44?\nA:"
ORDER = "7 times salad for Irene, please."
TOOL = {
    "type": "function",
    "function": {
        "name": "order_food",
        "parameters": {
            "type": "object",
            "properties": {
                "dish": {"type": "string", "maxLength": 20},
                "count": {"type": "integer", "minimum": 1, "maximum": 12},
                "name": {"type": "string", "maxLength": 20},
            },
            "required": ["dish", "count", "name"],
            "additionalProperties": False,
        },
    },
}


def expected(prompt: str | list[int], **options: object) -> str:
    """What the library writes."""
    loaded = shipped()
    given = GenerateOptions(**options)  # type: ignore[arg-type]  # as the test names them
    (completion,) = generate(loaded.model, [prompt], given, loaded.tokenizer)
    assert completion.text is not None
    return completion.text


@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_a_completion_is_the_librarys_text_whole_and_streamed(
    mode: str, client: openai.OpenAI
) -> None:
    """Guards against options that are lost on the way and text that is lost between chunks."""
    asked = {"model": "twotower", "prompt": SUM, "max_tokens": 30}
    ours = {"mode": mode}
    whole = client.completions.create(**asked, extra_body=ours)  # type: ignore[call-overload]
    assert whole.choices[0].text == expected(SUM, mode=mode, max_new_tokens=30)
    assert whole.choices[0].finish_reason == "stop"
    usage = whole.usage.model_dump()
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["context_forwards"] > 0 and (usage["nfe"] > 0) == (mode != "ar")
    chunks = list(
        client.completions.create(  # type: ignore[call-overload]
            **asked, stream=True, stream_options={"include_usage": True}, extra_body=ours
        )
    )
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert len([text for text in texts if text]) > 1, "nothing came before the end"
    # Whether the prompt was in the cache is the only difference.
    last = chunks[-1].usage.model_dump()
    for name in ("completion_tokens", "nfe", "tokens_per_nfe"):
        assert last[name] == usage[name]


def test_a_character_of_several_tokens_comes_whole(client: openai.OpenAI) -> None:
    """Guards against U+FFFD at the borders of token-by-token chunks."""
    prompt = "Q: What is the symbol of the euro?\nA:"
    stream = client.completions.create(
        model="twotower", prompt=prompt, max_tokens=40, stream=True, extra_body={"mode": "ar"}
    )
    texts = [choice.text for chunk in stream for choice in chunk.choices]
    assert "".join(texts) == expected(prompt, mode="ar", max_new_tokens=40)
    assert "\u20ac" in "".join(texts) and not any("\ufffd" in text for text in texts)


def test_lists_of_prompts_and_choices_come_in_order(client: openai.OpenAI) -> None:
    ids = shipped().tokenizer.encode(SUM, add_bos=True)  # type: ignore[union-attr]
    other = "Q: What is 77 in Spanish?\nA:"
    twice = client.completions.create(model="twotower", prompt=[SUM, other], n=2, max_tokens=20)
    texts = [choice.text for choice in twice.choices]
    assert [choice.index for choice in twice.choices] == [0, 1, 2, 3]
    first, second = (expected(prompt, max_new_tokens=20) for prompt in (SUM, other))
    assert texts == [first, first, second, second]
    by_ids = client.completions.create(model="twotower", prompt=[ids, ids], max_tokens=20)
    assert [choice.text for choice in by_ids.choices] == [first, first]
    assert by_ids.usage is not None and by_ids.usage.prompt_tokens == 2 * len(ids)


def test_choices_differ_when_sampled_and_repeat_with_their_seed(client: openai.OpenAI) -> None:
    def sample(seed: int | None) -> list[str]:
        answer = client.completions.create(
            model="twotower", prompt="Q:", n=3, max_tokens=6, temperature=1.5, seed=seed
        )
        return [choice.text for choice in answer.choices]

    assert sample(5) == sample(5)
    assert len(set(sample(5))) == 3
    assert sample(5)[0] == expected("Q:", temperature=1.5, seed=5, max_new_tokens=6)
    assert sample(None) != sample(None), "without a seed, two requests draw the same"


def test_stop_echo_and_length(client: openai.OpenAI) -> None:
    stopped = client.completions.create(
        model="twotower", prompt=SUM, stop=[" The"], echo=True, max_tokens=40
    )
    whole = expected(SUM, max_new_tokens=40)
    assert stopped.choices[0].text == SUM + whole[: whole.index(" The")]
    digit = shipped().need_tokenizer().encode("4")[-1]
    for ends in (digit, [digit, 5]):
        ended = client.completions.create(
            model="twotower", prompt=SUM, max_tokens=40, extra_body={"eos_token_id": ends}
        )
        assert ended.choices[0].text == expected(SUM, max_new_tokens=40, eos_token_id=ends)
        assert ended.choices[0].text != whole and ended.choices[0].finish_reason == "stop"
    short = client.completions.create(model="twotower", prompt=SUM, max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None and short.usage.completion_tokens == 3
    own = {"max_new_tokens": 3}  # as the command line and Python call it
    assert (
        client.completions.create(model="twotower", prompt=SUM, extra_body=own).usage == short.usage
    )


def test_logprobs_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="twotower", prompt=SUM, max_tokens=8, logprobs=2)
    shown = answer.choices[0].logprobs
    assert shown is not None and shown.tokens is not None and shown.token_logprobs is not None
    assert "".join(shown.tokens) == answer.choices[0].text
    assert shown.text_offset == [len("".join(shown.tokens[:n])) for n in range(len(shown.tokens))]
    assert all(value <= 0 for value in shown.token_logprobs)
    assert shown.top_logprobs is not None
    for token, value, top in zip(
        shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True
    ):
        # Greedy: the token is the most probable one.
        assert len(top) == 2 and max(top, key=top.__getitem__) == token
        assert top[token] == pytest.approx(value)
    chat = client.chat.completions.create(
        model="twotower",
        messages=[{"role": "user", "content": "How much is 48 - 44?"}],
        logprobs=True,
        top_logprobs=1,
        max_tokens=8,
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None
    # The same prompt: the plain chat format is the one of the text above.
    assert [one.token for one in content.content] == shown.tokens
    assert [one.logprob for one in content.content] == pytest.approx(shown.token_logprobs)


def test_chat_answers_in_the_shipped_models_format(client: openai.OpenAI) -> None:
    question = "What is 77 in Spanish?"
    asked = {"model": "twotower", "messages": [{"role": "user", "content": question}]}
    answer = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    text = expected(f"Q: {question}\nA:").lstrip()
    assert answer.choices[0].message.content == text == "77 in Spanish is setenta y siete."
    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    ]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_tool_is_called(choice: str, is_streamed: bool, client: openai.OpenAI) -> None:
    asked = {
        "model": "twotower",
        "messages": [{"role": "user", "content": ORDER}],
        "tools": [TOOL],
        "tool_choice": choice,
    }
    if is_streamed:
        chunks = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        (call,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice_made = client.chat.completions.create(**asked).choices[0]  # type: ignore[call-overload]
        (call,), reason = choice_made.message.tool_calls, choice_made.finish_reason
        assert choice_made.message.content is None
    assert reason == "tool_calls" and call.function.name == "order_food"
    arguments = json.loads(call.function.arguments)
    assert arguments == {"dish": "salad", "count": 7, "name": "Irene"}


def test_the_answer_to_a_call_goes_back_in(client: openai.OpenAI) -> None:
    """What a client's loop sends: the message with the call as it came, and the tool's result."""
    messages: list[dict[str, object]] = [{"role": "user", "content": ORDER}]
    first = client.chat.completions.create(  # type: ignore[call-overload]
        model="twotower", messages=messages, tools=[TOOL], tool_choice="required"
    )
    message = first.choices[0].message
    messages.append(message.model_dump())
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "ordered"}
    messages.append(result)
    second = client.chat.completions.create(  # type: ignore[call-overload]
        model="twotower", messages=messages, max_tokens=8
    )
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("written", ["", "{", '{"a": "\\ud800"}'])
def test_arguments_that_are_no_json_text_stay_text(written: str, client: openai.OpenAI) -> None:
    """Guards the history of a client whose call was cut, and against a 500 for half a character in
    JSON within JSON, which no tokenizer takes.
    """
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": written}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    answer = client.chat.completions.create(model="twotower", messages=turns, max_tokens=2)  # type: ignore[arg-type]
    assert answer.usage is not None and answer.usage.prompt_tokens >= len(written) / 8


@pytest.mark.parametrize("mode", ["speculative", "ar"])
def test_a_schema_is_kept_by_a_model_that_does_not_know_it(
    mode: str, client: openai.OpenAI
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["sum", "word"]},
            "values": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        },
        "required": ["kind", "values"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="twotower",
        messages=[{"role": "user", "content": "How much is 48 - 44?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        max_tokens=400,
        extra_body={"mode": mode},
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_diffusion_refuses_a_schema_with_the_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot follow a grammar") as refused:
        client.completions.create(
            model="twotower",
            prompt=SUM,
            extra_body={"mode": "diffusion", "response_format": {"type": "json_object"}},
        )
    assert refused.value.param == "mode"


NOTHING_FITS = {"type": "integer", "minimum": 3, "maximum": 2}


@pytest.mark.parametrize(
    ("schema", "reason"), [(NOTHING_FITS, "Unsatisfiable"), ({"$ref": "#"}, "no token can follow")]
)
def test_a_schema_that_cannot_be_kept_is_refused_by_its_field(
    client: openai.OpenAI, schema: dict[str, object], reason: str
) -> None:
    """Guards against a 500, also where a grammar's bounds show only when the text is under way."""
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        client.chat.completions.create(
            model="twotower",
            messages=[{"role": "user", "content": "a number"}],
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        )
    assert refused.value.param == "response_format" and refused.value.code == "bad_value"


def test_slow_grammars_keep_nobody_waiting_who_has_none(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the threads that all requests need, and those whose grammar is there already."""
    is_over, entered = threading.Event(), []

    def slow(*given: object) -> object:
        entered.append(1)
        is_over.wait(30)
        return build(*given)  # type: ignore[arg-type]

    known = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    first = {"prompt": "a", "max_tokens": 4, "response_format": known}
    httpx.post(f"{server.url}/v1/completions", json=first, timeout=60).raise_for_status()
    monkeypatch.setattr("twotower.serve.service.build", slow)

    def ask(number: int) -> None:
        schema = {"type": "integer", "minimum": number}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        body = {"prompt": "a", "max_tokens": 4, "response_format": form}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(entered) > 0)
        time.sleep(0.5)
        answer = client.with_options(timeout=15).completions.create(model="twotower", prompt=SUM)
        assert answer.choices[0].text
        again = httpx.post(f"{server.url}/v1/completions", json=first, timeout=15)
        assert again.status_code == 200
        assert len(entered) == 1, "a caller has one grammar built at a time"
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_async_clients_are_answered_side_by_side(server: Running) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model="twotower", prompt=f"Q: How much is {number} + 1?\nA:", stream=True
            )
            return "".join([c.text async for chunk in stream for c in chunk.choices])

        async with client:
            return await asyncio.gather(*(one(number) for number in range(20, 26)))

    texts = asyncio.run(ask())
    assert texts == [expected(f"Q: How much is {n} + 1?\nA:") for n in range(20, 26)]


def test_errors_are_the_packages_own(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here"):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError, match="suffix is not supported: this model") as bad:
        client.completions.create(model="twotower", prompt="a", suffix="b")
    assert bad.value.param == "suffix" and bad.value.code == "unsupported_field"
    assert [model.id for model in client.models.list()] == ["twotower"]
    assert client.models.retrieve("twotower").id == "twotower"
