"""Schemas: which objects are closed, and what is said of a part that cannot be kept."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_grammar import accepts
from twotower.engine.grammar import json_schema
from twotower.engine.grammar_schema import ready_schema

TEXT = {"type": "string"}
CITY = {"type": "object", "properties": {"city": TEXT}, "required": ["city"]}
OSLO, MORE = '{"city": "a"}', '{"city": "a", "x": 1}'
NAMED = {"type": "object", "properties": {"name": TEXT}, "required": ["name"]}
BOTH = '{"city": "a", "name": "b"}'


def is_whole(text: str, schema: Any, is_strict: bool = True) -> bool:
    """Whether a text may be written and end there."""
    return accepts(json_schema(schema, is_strict), text)


@pytest.mark.parametrize(
    ("schema", "fits", "invented"),
    [
        (CITY, OSLO, MORE),
        ({"properties": {"a": CITY}}, f'{{"a": {OSLO}}}', f'{{"a": {MORE}}}'),
        ({"type": "array", "items": CITY}, f"[{OSLO}]", f"[{MORE}]"),
        ({"type": "array", "prefixItems": [CITY], "items": False}, f"[{OSLO}]", f"[{MORE}]"),
        ({"anyOf": [CITY, NAMED]}, OSLO, BOTH),
        ({"$ref": "#/$defs/c", "$defs": {"c": CITY}}, OSLO, MORE),
        ({"type": "object"}, "{}", '{"x": 1}'),
        ({"type": ["object", "null"]}, "{}", '{"x": 1}'),
        ({"type": "object", "required": ["a"]}, '{"a": 1}', '{"a": 1, "x": 1}'),
        ({**CITY, "additionalProperties": CITY}, f'{{"city": "a", "x": {OSLO}}}', MORE),
        ({"allOf": [CITY, NAMED]}, BOTH, '{"city": "a", "name": "b", "x": 1}'),
        ({**CITY, "allOf": [NAMED]}, BOTH, OSLO),
        (
            {**CITY, "$ref": "#/$defs/n", "$defs": {"n": NAMED}},
            BOTH,
            '{"city": "a", "name": "b", "x": 1}',
        ),
        (
            {**CITY, "anyOf": [NAMED, {"required": ["z"]}]},
            BOTH,
            '{"city": "a", "name": "b", "x": 1}',
        ),
        ({**CITY, "unevaluatedProperties": False}, OSLO, MORE),
        ({"patternProperties": {"^a": TEXT}, "type": "object"}, '{"ab": ""}', '{"b": ""}'),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_objects_are_closed_at_every_depth(schema: Any, fits: str, invented: str) -> None:
    """Guards against invented keys, which a model writes until its length is used up, and against a
    closed part that forbids the keys of another part of the same object.
    """
    for is_strict in (True, False):
        assert is_whole(fits, schema, is_strict)
        assert not is_whole(invented, schema, is_strict)


@pytest.mark.parametrize(
    "schema",
    [
        {**CITY, "additionalProperties": True},
        {**CITY, "additionalProperties": {"type": "integer"}},
        {**CITY, "allOf": [{"additionalProperties": True}]},
    ],
)
def test_who_says_that_an_object_is_open_has_it_open(schema: Any) -> None:
    assert is_whole(MORE, schema, True) and is_whole(MORE, schema, False)


def test_a_map_that_must_not_be_empty_stays_a_map() -> None:
    schema = {"type": "object", "minProperties": 1}
    assert ready_schema(schema, "s") == schema


def test_a_definition_that_refers_to_itself_is_closed() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert is_whole('{"next": {"next": {}}}', tree)
    assert not is_whole('{"next": {"x": {}}}', tree)


def test_references_that_multiply_are_refused() -> None:
    """Guards the memory: thirty definitions that each hold two of the next are a billion."""
    chain = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)}
    with pytest.raises(ValueError, match="s: its parts refer to one another too often"):
        ready_schema({"$ref": "#/$defs/d0", "properties": {}, "$defs": chain}, "s")


NAMES = ["type", "properties", "allOf", "anyOf", "$ref", "items", "required", "minProperties"]
VALUES = st.recursive(
    st.sampled_from([None, 5, "object", "#", "#/properties/items", "#/allOf/0", True]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(schema=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5))
def test_damaged_schemas_are_left_to_the_library(schema: dict[str, Any]) -> None:
    """Guards against a 500 for a schema whose parts are of other types than they should be."""
    before = json.dumps(schema)
    ready_schema(schema, "s")
    assert json.dumps(schema) == before, "the caller's own schema was changed"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "string", "format": "sonnet"}, "sonnet"),
        ({"uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [CITY, CITY]}, "oneOf"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_place_or_passed_over(part: Any, said: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": part}}}
    with pytest.raises(ValueError, match=r"properties\.a\.items") as refused:
        is_whole("{}", schema)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert is_whole("{}", schema, is_strict=False)
