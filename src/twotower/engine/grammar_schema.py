"""A JSON schema made ready for the library: of a bounded size, and closed.

By the letter a JSON schema allows keys that it does not name. A model that writes under it would
invent them until its length is used up, and no caller means that: so an object is closed unless its
schema says otherwise (`additionalProperties`).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_MAX_DEPTH = 100  # of objects and lists in a schema
_MAX_PARTS = 20_000  # values in a schema
_MAX_REFERENCES = 1_000  # in a schema
_MAX_STRING = 2_000  # characters of a name, a constant, a pattern
# What stands in a schema and is one itself: for a part of the value, or for the value itself.
_OF_PARTS = ("items", "additionalProperties", "additionalItems", "contains")
_OF_PART_LISTS = ("prefixItems", "items")
_OF_PART_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_SAME = ("allOf", "anyOf", "oneOf")
_OPEN = ("additionalProperties", "unevaluatedProperties")  # a schema with them says it itself
_OF_OBJECTS = ("properties", "patternProperties", "required")

Schema = dict[str, Any]


def ready_schema(schema: Mapping[str, object] | bool | str, field: str) -> Schema | bool:
    """The schema, an object or its text, as a closed one; ValueError (one line) names `field`."""
    _check_size(schema, field)
    try:
        value = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field}: not JSON ({error}); give a JSON schema") from None
    if not isinstance(value, dict | bool):
        raise ValueError(f"{field}: {repr(value)[:300]} is not a JSON schema; give an object")
    if isinstance(schema, str):
        _check_size(value, field)
    return _Closer(value, field).closed(value) if isinstance(value, dict) else value


class _Closer:
    """Closes the objects of one schema."""

    def __init__(self, root: Schema, field: str) -> None:
        self._root, self._field, self._num_made = root, field, 0

    def closed(self, schema: Any) -> Any:
        """The schema with all of its objects closed."""
        if not isinstance(schema, dict):
            return schema
        if _is_combined(schema):  # each part would forbid the other's keys: they are closed as one
            found = self._parts_closed(schema, ())
            whole = list(self._same(found))
        else:
            found = self._parts_closed(schema, None)
            whole = [found]
        if found.get("unevaluatedProperties") is False:  # what is done here, by another name
            del found["unevaluatedProperties"]
        if any(name in part for part in whole for name in _OPEN):
            return found
        if not any(map(_is_object, whole)) or not all(map(_is_well_formed, whole)):
            return found
        names = [n for part in whole for n in (*part.get("properties", ()), *_required(part))]
        if found.get("minProperties", 0) > len(set(names)):  # a map, or nothing would fit
            return found
        patterns = {p: True for part in whole for p in part.get("patternProperties", ())}
        if patterns:
            found["patternProperties"] = patterns | found.get("patternProperties", {})
        found["properties"] = dict(found.get("properties", {}))
        for name in names:
            found["properties"].setdefault(name, True)
        found["additionalProperties"] = False
        return found

    def _parts_closed(self, schema: Schema, followed: tuple[str, ...] | None) -> Schema:
        """A copy whose parts are closed. followed: where not None, schemas for the same value stay
        open at their top, and stand in the place of references to them, but for these.
        """
        self._num_made += 1
        if self._num_made > _MAX_PARTS:
            raise ValueError(f"{self._field}: its parts refer to one another too often; simplify")
        found = dict(schema)
        for name, value in schema.items():
            if name in _OF_PART_NAMES and isinstance(value, dict):
                found[name] = {key: self.closed(part) for key, part in value.items()}
            elif name in _OF_PART_LISTS and isinstance(value, list):
                found[name] = [self.closed(part) for part in value]
            elif name in _OF_PARTS:
                found[name] = self.closed(value)
            elif name in _OF_SAME and isinstance(value, list):
                found[name] = [self._same_value(part, followed) for part in value]
        reference = schema.get("$ref")
        if followed is not None and isinstance(reference, str):
            target = self._target(reference)
            if reference not in followed and isinstance(target, dict):
                del found["$ref"]
                part = self._parts_closed(target, (*followed, reference))
                found["allOf"] = [*found.get("allOf", []), part]
        return found

    def _same_value(self, schema: Any, followed: tuple[str, ...] | None) -> Any:
        if followed is None:
            return self.closed(schema)
        return self._parts_closed(schema, followed) if isinstance(schema, dict) else schema

    def _same(self, schema: Schema) -> Iterator[Schema]:
        """A schema and all in it that are about the same value."""
        yield schema
        for name in _OF_SAME:
            parts = schema.get(name)
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict):
                    yield from self._same(part)

    def _target(self, reference: str) -> object:
        """What a reference within the schema points to, if anything."""
        value: object = self._root
        path, *names = reference.split("/")
        for name in names if path == "#" else ("",):
            key = unquote(name).replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and key.isdecimal() and int(key[:9]) < len(value):
                value = value[int(key[:9])]
            else:
                value = value.get(key) if isinstance(value, dict) else None
        return value


def _is_object(schema: Schema) -> bool:
    """Whether a schema says anything of objects."""
    kind = schema.get("type", "object" if any(name in schema for name in _OF_OBJECTS) else ())
    return kind == "object" or (isinstance(kind, list) and "object" in kind)


def _is_well_formed(schema: Schema) -> bool:
    """Whether it can be closed; the library says what is wrong with one that is not."""
    maps = [schema.get(name, {}) for name in ("properties", "patternProperties")]
    return all(isinstance(one, dict) for one in maps) and isinstance(
        schema.get("minProperties", 0), int
    )


def _is_combined(schema: Schema) -> bool:
    """Whether several schemas hold for one value at the same time."""
    same = [name for name in (*_OF_SAME, "$ref") if name in schema]
    num_all = len(schema["allOf"]) if isinstance(schema.get("allOf"), list) else 0
    return bool(same) and (_is_object(schema) or len(same) > 1 or num_all > 1)


def _required(schema: Schema) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _check_size(schema: object, field: str) -> None:
    """ValueError for a schema that is larger than any that is meant."""
    num_parts = num_references = depth = longest = 0
    left = [(schema, 0)]  # without recursion, however deep it is
    while left and num_parts <= _MAX_PARTS:
        value, level = left.pop()
        num_parts += 1
        depth = max(depth, level)
        if isinstance(value, dict):
            num_references += "$ref" in value
            longest = max(longest, *map(_length, [*value, *_matched(value)]))
            value = list(value.values())
        if isinstance(value, list):
            left += [(part, level + 1) for part in value]
    for count, most, what in (
        (num_parts, _MAX_PARTS, "values"),
        (depth, _MAX_DEPTH, "levels of objects and lists"),
        (num_references, _MAX_REFERENCES, "references ($ref)"),
        (longest, _MAX_STRING, "characters in a name, constant or pattern"),
    ):
        if count > most:
            raise ValueError(f"{field}: has more than {most} {what}; give a smaller schema")


def _matched(schema: dict[str, object]) -> list[object]:
    """Of an object of a schema, the values that a text is compared with."""
    options = schema.get("enum")
    known = options if isinstance(options, list) else []
    return [schema.get("const"), schema.get("pattern"), *known]


def _length(value: object) -> int:
    return len(value) if isinstance(value, str) else 0
