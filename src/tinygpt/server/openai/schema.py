"""JSON Schema, the part of it that we use.

The schema that checks a request's body also stands in /openapi.json, so the two cannot differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tinygpt.errors import nearest
from tinygpt.server.http.refusal import Refusal

Schema = Mapping[str, Any]

NOUNS = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def object_schema(fields: Mapping[str, Any], *required: str, strict: bool = True) -> Schema:
    """An object with these fields; ``strict``: and with no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": not strict,
    }


def check(value: Any, schema: Schema, path: str = "") -> None:
    """Raise Refusal for a value that does not fit: it names the field and what is wanted there."""
    problem = next(problems(value, schema, path), None)
    if problem is not None:
        where, message, code = problem
        raise Refusal(400, message, param=where or None, code=code)


def given(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that are not null; JSON's 2.0 is an int, as it is a whole number.

    >>> given({"n": 2.0, "stop": None})
    {'n': 2}
    """
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in body.items()
        if value is not None
    }


def problems(value: Any, schema: Schema, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, message, code) of each problem of a value; messages do not quote the value."""
    if not _fits(value, schema):
        name = path or "The body"
        yield path, f"{name} must be {wanted(schema)}.", "invalid_value"
    elif isinstance(value, dict) and "properties" in schema:
        yield from _problems_of_object(value, schema, path)
    elif isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from problems(item, schema["items"], f"{path}[{i}]")


def _problems_of_object(
    value: dict[str, Any], schema: Schema, path: str
) -> Iterator[tuple[str, str, str]]:
    known, others = schema["properties"], schema.get("additionalProperties", True)
    names = schema.get("propertyNames", {}).get("pattern", "")
    inside = f"{path}." if path else ""
    for name in schema.get("required", ()):
        if name not in value:
            yield inside + name, f"{inside}{name} is missing.", "missing_required_parameter"
    for name, inner in value.items():
        if name in known:
            yield from problems(inner, known[name], inside + name)
        elif names and not re.search(names, name):
            yield path, f"{path or 'The body'} has a name that is not allowed.", "invalid_value"
        elif isinstance(others, Mapping):
            for _, _, code in problems(inner, others, path):
                yield path, f"Each value of {path} must be {wanted(others)}.", code
        elif others is False:
            hint = nearest(name[:64], list(known))
            message = f"{path or 'The body'} has a field that is not known here.{hint}"
            yield path, message, "unknown_parameter"


def unknown(value: Any, schema: Schema, path: str = "") -> Iterator[str]:
    """Paths of the fields of a valid value that its schema does not name.

    >>> list(unknown({"a": [{"b": 1}]}, {"properties": {"a": {"items": {"properties": {}}}}}))
    ['a[].b']
    """
    for option in schema.get("anyOf", ()):
        if next(problems(value, option), None) is None:
            yield from unknown(value, option, path)
            return
    if isinstance(value, list) and "items" in schema:
        for item in value:
            yield from unknown(item, schema["items"], f"{path}[]")
    elif isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        inside = f"{path}." if path else ""
        for name, inner in value.items():
            if name in known:
                yield from unknown(inner, known[name], inside + name)
            elif inner is not None and "propertyNames" not in schema:
                yield inside + name


def _fits(value: Any, schema: Schema) -> bool:
    """Whether the value fits, apart from items and properties, which the caller checks.

    An ``anyOf`` checks those, too.
    """
    if "anyOf" in schema:
        return any(next(problems(value, s), None) is None for s in schema["anyOf"])
    types = schema.get("type", ())
    if types and not any(_is(value, t) for t in ([types] if isinstance(types, str) else types)):
        return False
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        return False
    if isinstance(value, str | list):
        kind = "Length" if isinstance(value, str) else "Items"
        return bool(schema.get(f"min{kind}", 0) <= len(value) <= schema.get(f"max{kind}", math.inf))
    if _is(value, "number"):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return bool(low <= value <= high and value > schema.get("exclusiveMinimum", -math.inf))
    return True


def _is(value: Any, kind: str) -> bool:
    """Whether a value has one of JSON's types: true is no number, and 2.0 is an integer."""
    match kind:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "number":
            return type(value) in (int, float) and math.isfinite(value)
        case "integer":
            return type(value) is int or (type(value) is float and value.is_integer())
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case _:
            return isinstance(value, dict)


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def wanted(schema: Schema) -> str:
    """What a schema asks for, in words.

    >>> wanted({"type": ["integer", "null"], "minimum": 1, "maximum": 16})
    'a whole number from 1 to 16, or null'
    """
    if "anyOf" in schema:
        return ", or ".join(map(wanted, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(_literal(value) for value in schema["enum"])
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    noun = NOUNS[types[0]] + _extent(schema)
    if "items" in schema:
        noun += f", each {wanted(schema['items'])}"
    return noun + (", or null" if "null" in types[1:] else "")


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    return "null" if value is None else str(value).lower().replace("'", '"')


def _extent(schema: Schema) -> str:
    for low, high, unit in (
        ("minimum", "maximum", ""),
        ("exclusiveMinimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
    ):
        if high in schema and (low in schema or unit):
            of = " of" if unit else " above" if low.startswith("exclusive") else " from"
            least = schema.get(low, 0)
            between = " and up to" if low.startswith("exclusive") else " to"
            return f"{of} {least}{between} {schema[high]}{unit}"
    return ""
