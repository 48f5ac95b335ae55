"""Tools and schemas, as clients of the `openai` package send them."""

import json
from typing import Any

import openai
import pytest

from asked import ARGUMENTS, ASK, ORDER, PARAMETERS, TOOL, City
from serving import shipped


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_without_additional_properties_gets_no_invented_keys(
    strict: bool | None, client: openai.OpenAI
) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
    }
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "c", "schema": schema, "strict": strict},
    }
    answer = client.chat.completions.create(model="twotower", messages=ASK, response_format=form)
    assert answer.choices[0].finish_reason == "stop"
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_the_last_value_of_a_closed_object_ends_where_the_model_ends_it(
    mode: str, client: openai.OpenAI
) -> None:
    """Guards values: a model that goes on with the key it was taught, by `",` or a comma, was made
    to write on in the value instead.
    """
    for last in ("dish", "count"):
        names = {"dish": ["dish"], "count": ["dish", "count"]}[last]
        parameters = {
            "type": "object",
            "properties": {n: PARAMETERS["properties"][n] for n in names},
        }
        function = {"name": "order_food", "parameters": {**parameters, "required": names}}
        answer = client.chat.completions.create(
            model="twotower",
            messages=[{"role": "user", "content": ORDER}],
            tools=[{"type": "function", "function": function}],  # type: ignore[typeddict-item]
            tool_choice="required",
            extra_body={"mode": mode},
        )
        (call,) = answer.choices[0].message.tool_calls or ()
        found = json.loads(call.function.arguments)  # type: ignore[union-attr]
        assert found == {name: ARGUMENTS[name] for name in names}


@pytest.mark.parametrize(
    "function",
    [
        {},
        {"parameters": None},
        {"parameters": {}},
        {"parameters": {"type": "object"}, "strict": True},
    ],
    ids=str,
)
def test_a_function_without_parameters_gets_no_arguments(
    function: dict[str, Any], client: openai.OpenAI
) -> None:
    tool: Any = {"type": "function", "function": {"name": "now", **function}}
    answer = client.chat.completions.create(
        model="twotower", messages=ASK, tools=[tool], tool_choice="required"
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.arguments == "{}"  # type: ignore[union-attr]


def test_with_tools_text_flows_and_the_reason_comes_alone(client: openai.OpenAI) -> None:
    """Guards the stream of a client with tools, which got all of a text at its end."""
    asked: dict[str, Any] = {"model": "twotower", "tools": [TOOL], "stream": True}
    asked["max_tokens"] = 30
    asked |= {"extra_body": {"mode": "ar", "logit_bias": bias_against(' {"', "{", ' "', " {")}}
    chunks = [c.choices[0] for c in client.chat.completions.create(messages=ASK, **asked)]
    assert len([c for c in chunks if c.delta.content]) > 8
    assert not any(c.delta.tool_calls for c in chunks)
    order = [{"role": "user", "content": ORDER}]
    asked |= {"extra_body": {}, "max_tokens": 60}
    chunks = [c.choices[0] for c in client.chat.completions.create(messages=order, **asked)]
    last = chunks[-1]
    assert last.finish_reason == "tool_calls" and not last.delta.tool_calls
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)


def bias_against(*texts: str) -> dict[str, float]:
    tokenizer = shipped().tokenizer
    assert tokenizer is not None
    tokens = [token for text in texts for token in tokenizer.encode(text)[:1]]
    return {str(token): -100.0 for token in tokens}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_call_that_max_tokens_cuts_is_a_call(is_streamed: bool, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "twotower", "tools": [TOOL], "max_tokens": 13}
    asked["messages"] = [{"role": "user", "content": ORDER}]
    if is_streamed:
        chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        calls, text = choice.message.tool_calls, choice.message.content or ""
        reason = choice.finish_reason
    ((name, arguments),) = [(call.function.name, call.function.arguments) for call in calls]
    assert name == "order_food" and text == "" and reason == "length"
    assert '{"dish": "salad", "count": 7'.startswith(arguments)


def test_wherever_a_call_is_cut_stream_and_whole_answer_agree(client: openai.OpenAI) -> None:
    """Guards what vllm#53269 tells: a stream called a cut call whole, and clients ran it."""
    asked: dict[str, Any] = {"model": "twotower", "tools": [TOOL], "tool_choice": "required"}
    asked["messages"] = [{"role": "user", "content": ORDER}]
    reasons = []
    for most in range(1, 48, 3):
        choice = client.chat.completions.create(**asked, max_tokens=most).choices[0]
        whole = [call.function.arguments for call in choice.message.tool_calls or ()]
        stream = client.chat.completions.create(**asked, max_tokens=most, stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert [call.function.arguments for call in calls] == whole  # type: ignore[union-attr]
        assert chunks[-1].finish_reason == choice.finish_reason
        assert not choice.message.content and not any(c.delta.content for c in chunks)
        reasons.append(choice.finish_reason)
        if choice.finish_reason == "tool_calls":
            assert json.loads(whole[0]) == ARGUMENTS
    assert reasons[0] == "length" and reasons[-1] == "tool_calls" and reasons == sorted(reasons)


def test_tools_and_a_schema_may_come_together(client: openai.OpenAI) -> None:
    """What an agent with tools and a typed result sends: a reply is a call or of the schema."""
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "c", "schema": City.model_json_schema()},
    }
    asked: dict[str, Any] = {"model": "twotower", "tools": [TOOL], "response_format": form}
    order = [{"role": "user", "content": ORDER}]
    called = client.chat.completions.create(messages=order, **asked).choices[0]
    assert json.loads(called.message.tool_calls[0].function.arguments) == ARGUMENTS
    tokenizer = shipped().tokenizer
    assert tokenizer is not None
    # Without this letter there is no "name", with which a call begins.
    with_n = [t for t in range(tokenizer.vocab_size) if b"n" in tokenizer.token_bytes(t)]
    asked["extra_body"] = {"mode": "ar", "logit_bias": {str(t): -100.0 for t in with_n}}
    answered = client.chat.completions.create(messages=order, **asked).choices[0]
    assert City.model_validate_json(answered.message.content) and answered.finish_reason == "stop"


def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    other = {"type": "function", "function": {"name": "now"}}
    chosen = [{"type": "function", "function": {"name": "now"}}]
    choice: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": chosen},
    }
    asked: dict[str, Any] = {"model": "twotower", "messages": [{"role": "user", "content": ORDER}]}
    answer = client.chat.completions.create(**asked, tools=[TOOL, other], tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].function.name == "now"
    with pytest.raises(openai.BadRequestError, match="there is no tool 'now' among tools"):
        client.chat.completions.create(**asked, tools=[TOOL], tool_choice=choice)


def test_what_cannot_be_enforced_is_refused_with_tool_and_place_where_strict(
    client: openai.OpenAI,
) -> None:
    """Guards the other tools of a request: one keyword of one tool refused them all, unnamed."""
    names = {"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": True}
    parameters = {"type": "object", "properties": {"fields": names}}
    tool = {"name": "save", "parameters": parameters}
    asked: dict[str, Any] = {"model": "twotower", "messages": [{"role": "user", "content": ORDER}]}
    tools = [TOOL, {"type": "function", "function": tool}]
    answer = client.chat.completions.create(**asked, tools=tools)
    assert answer.choices[0].message.tool_calls[0].function.name == "order_food"
    strict = [TOOL, {"type": "function", "function": {**tool, "strict": True}}]
    said = r"tools: save: parameters: at properties\.fields: .*propertyNames"
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.chat.completions.create(**asked, tools=strict)
    assert refused.value.param == "tools"
    form = {"name": "s", "schema": parameters, "strict": True}
    with pytest.raises(openai.BadRequestError, match=r"at properties\.fields: ") as refused:
        client.chat.completions.create(
            **asked, response_format={"type": "json_schema", "json_schema": form}
        )
    assert refused.value.param == "response_format"
