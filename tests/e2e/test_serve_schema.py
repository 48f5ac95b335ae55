"""Generated requests against /openapi.json: whatever comes, no answer is a 5xx."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from serving import Running, running, tiny
from twotower.serve.chat import PLAIN

FEW = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    template = tmp_path_factory.mktemp("schema") / "chat.jinja"
    template.write_text(PLAIN)
    # Many of the generated bodies are valid: they are to be short.
    short = {"max_new_tokens": 4, "max_rows_per_request": 2, "max_steps_per_block": 4}
    with running(loaded=tiny(), chat_template=template, **short) as server:
        yield server


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_generated_request_breaks_the_server(mode: GenerationMode, server: Running) -> None:
    """Bodies that keep the schema and bodies that do not; docs/serving.md has a longer run."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: list[int] = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @FEW
        @given(case=operation.as_strategy(generation_mode=mode))
        def try_one(case: schemathesis.Case) -> None:
            answer = case.call(timeout=60)
            statuses.append(answer.status_code)
            case.validate_response(
                answer,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    schemathesis.checks.content_type_conformance,
                    schemathesis.checks.status_code_conformance,
                ],
            )

        try:
            try_one()
        except Exception as error:
            if "Unsatisfiable" not in type(error).__name__:  # no wrong request to GET /health
                raise
    assert len(statuses) >= 16 and {200, 400} & set(statuses)
