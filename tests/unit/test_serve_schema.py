"""Bodies: how much is said of a bad one."""

import pytest
from pydantic import ValidationError
from pydantic_core import from_json

from scripts import script
from twotower.serve.errors import ApiError
from twotower.serve.schema import ChatRequest, CompletionRequest, Decoding, parse

field_table = script("field_table")
FEW = 12  # errors of one field, for each type that was tried


def keys(count: int) -> str:
    return ",".join(f'"k{i}":1' for i in range(count))


USER = '{"role":"user","content":"a"}'


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt":[' + "1," * 1000 + '"x"]}',
        '{"prompt":[' + '"",' * 1000 + "1]}",
        '{"prompt":[' + "[-1]," * 1000 + "[]]}",
        '{"prompt":"a","stop":[' + "1," * 1000 + "1]}",
        '{"prompt":"a",' + keys(1000) + "}",
        '{"prompt":"a","stream_options":{' + keys(1000) + "}}",
        '{"prompt":"a","response_format":{"type":"x",' + keys(1000) + "}}",
        '{"messages":[' + "1," * 1000 + "1]}",
        '{"messages":[{' + keys(1000) + "}]}",
        '{"messages":[{"role":"user","content":[' + "{}," * 1000 + "{}]}]}",
        '{"messages":[{"role":"user","tool_calls":[' + "{}," * 1000 + "{}]}]}",
        '{"messages":[' + USER + '],"tools":[' + "{}," * 127 + "{}]}",
        '{"messages":[' + USER + '],"tool_choice":{' + keys(1000) + "}}",
    ],
)
def test_validation_ends_at_the_first_errors(body: str) -> None:
    """Guards the event loop: a body had as many errors as it had values, each a dictionary."""
    record: type[Decoding] = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as found:
        record.model_validate(from_json(body))
    assert found.value.error_count() <= FEW
    with pytest.raises(ApiError) as refused:
        parse(record, body.encode())
    assert refused.value.status == 400 and len(refused.value.message) < 200


def test_too_many_lists_are_not_made() -> None:
    with pytest.raises(ApiError, match="more than 100000 lists and objects"):
        parse(CompletionRequest, b'{"prompt":[' + b"[]," * 200_000 + b"[]]}")


def test_the_page_has_todays_fields() -> None:
    assert field_table.TABLE.filled() == field_table.TABLE.page, "run python scripts/field_table.py"


@pytest.mark.parametrize(
    ("record", "name", "said"),
    [
        (ChatRequest, "tempratur", "tempratur is not a field of this request, perhaps temperature"),
        (ChatRequest, "modalitys", "of this request; see /openapi.json"),
        (CompletionRequest, "messages", "of this request; see /openapi.json"),
        (ChatRequest, "modalities", "modalities is not supported: this model writes text only"),
    ],
)
def test_a_hint_does_not_mislead(record: type[Decoding], name: str, said: str) -> None:
    """Guards against "modalities: did you mean deadline_s?"."""
    with pytest.raises(ApiError) as refused:
        parse(record, f'{{"{name}": "x"}}'.encode())
    assert said in refused.value.message and refused.value.param == name


def test_a_length_is_refused_in_plain_words() -> None:
    """Guards pydantic's own: "should have at least 1 item after validation, not 0"."""
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, b'{"messages": []}')
    assert refused.value.message == "messages: list should have at least 1 item"


def test_what_is_quoted_is_short() -> None:
    """Guards the log and the answer against a megabyte that comes back."""
    error = ApiError(400, "x" * 100_000, param="y" * 100_000)
    assert len(error.message) < 600 and len(error.param or "") <= 100
