"""A server of the shipped model for a module's tests, and OpenAI's client of it."""

from collections.abc import Iterator

import openai
import pytest

from serving import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
