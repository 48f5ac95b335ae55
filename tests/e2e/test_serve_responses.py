"""/v1/responses through the `openai` package."""

import json
from typing import Any

import openai
import pytest

from asked import ARGUMENTS, ASK, NUMBER, ORDER, PARAMETERS, SPANISH, City, post
from serving import Running


def test_responses_answer_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="twotower", input=SPANISH)
    assert answer.output_text == NUMBER and answer.status == "completed"
    assert answer.usage is not None and answer.usage.input_tokens > 5
    with client.responses.stream(model="twotower", input=SPANISH) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == NUMBER
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * (len(events) - 8),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))  # type: ignore[union-attr]
    cut = client.responses.create(model="twotower", input=SPANISH, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete"  # type: ignore[union-attr]
    parsed = client.responses.parse(model="twotower", input=SPANISH, text_format=City)
    assert isinstance(parsed.output_parsed, City)


def test_responses_are_the_answers_of_chat(client: openai.OpenAI) -> None:
    """Guards instructions and earlier items: they are the same conversation."""
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": []},
        {"role": "user", "content": SPANISH},
    ]
    asked: dict[str, Any] = {
        "model": "twotower",
        "max_output_tokens": 8,
        "instructions": "Be kind.",
    }
    found = client.responses.create(input=items, **asked)
    turns: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        *ASK,
    ]
    chat = client.chat.completions.create(model="twotower", messages=turns, max_tokens=8)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage is not None and chat.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.instructions == "Be kind."


def test_responses_call_tools_and_read_their_results(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "order_food", "parameters": PARAMETERS, "strict": True}
    order = {"role": "user", "content": ORDER}
    whole = client.responses.create(model="twotower", input=[order], tools=[tool])  # type: ignore[list-item]
    with client.responses.stream(model="twotower", input=[order], tools=[tool]) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert kinds[2:6] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    for answer in (whole, streamed):
        (call,) = answer.output
        assert call.type == "function_call" and json.loads(call.arguments) == ARGUMENTS
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "ordered"}
        history: list[Any] = [order, *answer.output, result]
        asked: dict[str, Any] = {"model": "twotower", "max_output_tokens": 2}
        again = client.responses.create(input=history, **asked)
        function = {"name": call.name, "arguments": call.arguments}
        turns: list[Any] = [
            order,
            {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]},
            {"role": "tool", "tool_call_id": "c", "content": "ordered"},
        ]
        chat = client.chat.completions.create(model="twotower", messages=turns, max_tokens=2)
        assert again.usage is not None and chat.usage is not None
        assert again.usage.input_tokens == chat.usage.prompt_tokens
    cut = client.responses.create(
        model="twotower",
        input=[order],  # type: ignore[list-item]
        tools=[tool],
        max_output_tokens=13,
    )
    assert (cut.status, cut.output[0].type) == ("incomplete", "function_call")
    assert cut.output[0].status == "incomplete"
    chosen: Any = {"type": "function", "name": "order_food"}
    client.responses.create(model="twotower", input="a", tools=[tool], tool_choice=chosen)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "nothing is kept between requests"),
        (
            {"input": [{"type": "computer_call"}]},
            "an item of type 'computer_call'",
        ),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.name"),
        (
            {"input": "a", "previous_response_id": "r"},
            "previous_response_id is not supp",
        ),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content: "),
        ({"input": "a", "max_output_tokens": -1}, "max_output_tokens=-1 must be"),
        (
            {"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "text.format: ",
        ),
        ({"input": "a", "store": True}, "store is not supported: nothing is kept"),
    ],
)
def test_responses_refuse_what_they_cannot_do(
    body: dict[str, Any], said: str, server: Running
) -> None:
    answer = post(server, "/v1/responses", **body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]
