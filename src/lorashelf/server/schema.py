"""The part of JSON Schema that the API's requests need: what the documents state is what is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_BOUNDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "more than"),
}
_LENGTHS = {
    "minLength": (str, "minimum", "characters"),
    "minItems": (list, "minimum", "items"),
    "maxItems": (list, "maximum", "items"),
}


def faults(value: Any, schema: Schema, where: str = "the body") -> Iterator[str]:
    """Yield what in a JSON value does not fit a schema, each fault with its place.

    >>> list(faults({"n": 3}, {"type": "object", "properties": {"n": {"type": "integer", "maximum": 2}}}))
    ['n is 3; give at most 2']
    """
    if "anyOf" in schema:
        if all(any(True for _ in faults(value, one, where)) for one in schema["anyOf"]):
            yield f"{where} is {_shown(value)}; give {' or '.join(_kind(one) for one in schema['anyOf'])}"
        return
    if "type" in schema and not any(_TYPES[name](value) for name in _names(schema)):
        yield f"{where} is {_shown(value)}; give {_kind(schema)}"
        return
    if "enum" in schema and not any(_equal(value, one) for one in schema["enum"]):
        yield f"{where} is {_shown(value)}; give {' or '.join(map(_shown, schema['enum']))}"
        return
    yield from _bounds(value, schema, where)
    if isinstance(value, dict):
        yield from _members(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from faults(item, schema["items"], f"{where}[{i}]")


def _bounds(value: Any, schema: Schema, where: str) -> Iterator[str]:
    for name, (holds, words) in _BOUNDS.items():
        if name in schema and _is_number(value) and not holds(value, schema[name]):
            yield f"{where} is {_shown(value)}; give {words} {schema[name]}"
    for name, (kind, bound, noun) in _LENGTHS.items():
        holds, words = _BOUNDS[bound]
        if name in schema and isinstance(value, kind) and not holds(len(value), schema[name]):
            yield f"{where} has {len(value)} {noun}; give {words} {schema[name]}"


def _members(value: Mapping[str, Any], schema: Schema, where: str) -> Iterator[str]:
    within = "" if where == "the body" else f"{where}."
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{within}{name} is missing"
    for name, item in value.items():
        if name in properties:
            yield from faults(item, properties[name], f"{within}{name}")
        elif schema.get("additionalProperties") is False:
            yield f"{within}{_shown(name)[1:-1]} is not supported"


def _equal(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _names(schema: Schema) -> list[str]:
    return [schema["type"]] if isinstance(schema["type"], str) else list(schema["type"])


def _kind(schema: Schema) -> str:
    if "enum" in schema:
        return " or ".join(map(_shown, schema["enum"]))
    return " or ".join(_names(schema))


def _shown(value: Any) -> str:
    """Return a short text of a value: of objects and lists the kind alone."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
