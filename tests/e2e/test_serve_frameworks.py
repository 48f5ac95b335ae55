"""The server behind the frameworks that most of its users have, each with its own package.

They are not among the packages of the tests: some need another version of `openai` than the one
that the tests are pinned to. `pip install langchain-openai litellm instructor openai-agents
"pydantic-ai-slim[openai]"` in an environment of their own runs what is skipped here.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from serving import running

ORDER = "7 times salad for Irene, please."
SPANISH = "What is 77 in Spanish?"
NUMBER = "77 in Spanish is setenta y siete."
ARGUMENTS = {"dish": "salad", "count": 7, "name": "Irene"}


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]


def order_food(dish: str, count: int, name: str) -> str:
    """Order food."""
    assert {"dish": dish, "count": count, "name": name} == ARGUMENTS
    return "ordered"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as server:
        yield f"{server.url}/v1"


def needed(package: str) -> Any:
    """The module, or a skipped test that says what to install."""
    return pytest.importorskip(package, reason=f"needs {package}; see the top of this file")


@pytest.mark.parametrize("is_responses", [False, True])
def test_langchain(is_responses: bool, url: str) -> None:
    of_langchain = needed("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    chat = of_langchain.ChatOpenAI(
        model="twotower", base_url=url, api_key="none", use_responses_api=is_responses
    )
    assert chat.invoke(SPANISH).text == NUMBER
    assert "".join(chunk.text for chunk in chat.stream(SPANISH)) == NUMBER
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(City, method=method).invoke(SPANISH), City)
    with_tools = chat.bind_tools([tool(order_food)])
    streamed = None
    for chunk in with_tools.stream(ORDER):
        streamed = chunk if streamed is None else streamed + chunk
    for answer in (with_tools.invoke(ORDER), streamed):
        (call,) = answer.tool_calls
        assert call["args"] == ARGUMENTS
        result = ToolMessage("ordered", tool_call_id=call["id"])
        chat.invoke([HumanMessage(ORDER), answer, result, HumanMessage(SPANISH)], max_tokens=2)


def test_langchain_completions(url: str) -> None:
    of_langchain = needed("langchain_openai")
    complete = of_langchain.OpenAI(model="twotower", base_url=url, api_key="none", max_tokens=30)
    assert complete.invoke(f"Q: {SPANISH}\nA:").strip() == NUMBER


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    litellm = needed("litellm")
    model = {"model": "openai/twotower", "api_base": url, "api_key": "none"}
    ask = [{"role": "user", "content": SPANISH}]
    message = litellm.completion(messages=ask, **model).choices[0].message
    assert message.content == NUMBER
    usage = {"include_usage": True}
    chunks = list(litellm.completion(messages=ask, stream=True, stream_options=usage, **model))
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == NUMBER and chunks[-1].usage.total_tokens > 10
    schema = City.model_json_schema()
    function = {"name": "order_food", "parameters": {"type": "object", "properties": {}}}
    for name, kind in (("dish", "string"), ("count", "integer"), ("name", "string")):
        function["parameters"]["properties"][name] = {"type": kind}  # type: ignore[index]
    tools = [{"type": "function", "function": function}]
    order = [{"role": "user", "content": ORDER}]
    called = litellm.completion(messages=order, tools=tools, **model).choices[0].message
    assert json.loads(called.tool_calls[0].function.arguments) == ARGUMENTS
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "ordered"}
    for history in ([message], [called, result], [called.model_dump(), result]):
        litellm.completion(messages=[*order, *history, *ask], max_tokens=2, **model)
    typed = litellm.completion(messages=ask, response_format=City, **model).choices[0].message
    assert set(json.loads(typed.content)) == set(schema["properties"])
    assert litellm.responses(input=SPANISH, **model).output[0].content[0].text == NUMBER


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(kind: str, url: str) -> None:
    pydantic_ai = needed("pydantic_ai")
    models = needed("pydantic_ai.models.openai")
    from pydantic_ai.providers.openai import OpenAIProvider

    model = getattr(models, kind)("twotower", provider=OpenAIProvider(base_url=url, api_key="none"))
    assert pydantic_ai.Agent(model).run_sync(SPANISH).output == NUMBER
    typed = pydantic_ai.Agent(model, output_type=City)
    first = typed.run_sync(SPANISH)
    again = typed.run_sync(SPANISH, message_history=first.all_messages())
    assert isinstance(first.output, City) and isinstance(again.output, City)
    native = pydantic_ai.Agent(model, output_type=pydantic_ai.NativeOutput(City))
    assert isinstance(native.run_sync(SPANISH).output, City)
    orders = pydantic_ai.Agent(model, output_type=order_food)  # its call ends the run
    assert orders.run_sync(ORDER).output == "ordered"

    async def streamed() -> AsyncIterator[str]:
        async with pydantic_ai.Agent(model).run_stream(SPANISH) as run:
            async for piece in run.stream_text(delta=True, debounce_by=None):
                yield piece

    async def text() -> str:
        return "".join([piece async for piece in streamed()])

    assert asyncio.run(text()) == NUMBER


@pytest.mark.parametrize(
    "mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "FUNCTIONS", "RESPONSES_TOOLS"]
)
def test_instructor(mode: str, url: str) -> None:
    instructor = needed("instructor")
    import openai

    plain = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    ask = [{"role": "user", "content": SPANISH}]
    found = client.chat.completions.create(
        model="twotower", messages=ask, response_model=City, max_retries=0
    )
    assert isinstance(found, City)


@pytest.mark.parametrize("kind", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_openai_agents(kind: str, url: str) -> None:
    agents = needed("agents")
    import openai

    agents.set_tracing_disabled(True)

    async def work() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        model = getattr(agents, kind)(model="twotower", openai_client=client)
        first = {"tool_use_behavior": "stop_on_first_tool"}
        tools = {"tools": [agents.function_tool(order_food)], **first}

        async def run(given: Any, **shape: Any) -> Any:
            return await agents.Runner.run(agents.Agent(name="a", model=model, **shape), given)

        assert (await run(SPANISH)).final_output == NUMBER
        assert isinstance((await run(SPANISH, output_type=City)).final_output, City)
        ordered = await run(ORDER, **tools)
        assert ordered.final_output == "ordered"
        typed = await run(ORDER, **tools, output_type=City)
        assert typed.new_items[0].raw_item.name == "order_food"
        history = [*ordered.to_input_list(), {"role": "user", "content": SPANISH}]
        await run(history)
        agent = agents.Agent(name="a", model=model, instructions="Be kind.")
        streamed = agents.Runner.run_streamed(agent, SPANISH)
        kinds = {event.type async for event in streamed.stream_events()}
        assert "raw_response_event" in kinds and streamed.final_output

    asyncio.run(work())
