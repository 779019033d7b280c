"""JSON schemas drawn at random, small enough that a model that writes at random completes them."""

from __future__ import annotations

import random
from typing import Any


def schema_at_random(seed: int) -> dict[str, Any]:
    """An object, an array or a plain value."""
    return _schema(random.Random(seed), depth=3)


def _schema(draw: random.Random, *, depth: int) -> dict[str, Any]:
    plain = [_integer, _number, _string, _pattern, _enum, _boolean, _const]
    nested = [_object, _object, _array, _any_of]
    # `#/$defs` is at the root only.
    return draw.choice([*nested, _reference] if depth == 3 else plain + nested if depth else plain)(draw, depth)


def _integer(draw: random.Random, _: int) -> dict[str, Any]:
    low = draw.randrange(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(100)}


def _number(draw: random.Random, _: int) -> dict[str, Any]:
    # As an exclusive range: without one a number's digits never end.
    return {"type": "number", "exclusiveMinimum": 0, "maximum": draw.randrange(1, 9), "multipleOf": 0.5}


def _string(draw: random.Random, _: int) -> dict[str, Any]:
    low = draw.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + draw.randrange(8)}


def _pattern(draw: random.Random, _: int) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": draw.choice(["^[a-z]{2,5}$", "^(red|green)-[0-9]{3}$", "^[A-F0-9]{4}(:[A-F0-9]{4})?$"]),
    }


def _enum(draw: random.Random, _: int) -> dict[str, Any]:
    return {"enum": draw.sample(["x", "water wheel", 17, 2.5, None, True, "é🙂", '"quoted\\'], 3)}


def _boolean(_: random.Random, __: int) -> dict[str, Any]:
    return {"type": ["boolean", "null"]}


def _const(draw: random.Random, _: int) -> dict[str, Any]:
    return {"const": draw.choice(["fixed", 0, {"k": [1, 2]}, []])}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["name", "äge", "a b", "list", "x"], draw.randrange(1, 4))
    properties = {name: _schema(draw, depth=depth - 1) for name in names}
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": False,
    }


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randrange(2)
    return {
        "type": "array",
        "items": _schema(draw, depth=depth - 1),
        "minItems": low,
        "maxItems": low + draw.randrange(1, 3),
    }


def _any_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(draw, depth=depth - 1), _schema(draw, depth=depth - 1)]}


def _reference(draw: random.Random, depth: int) -> dict[str, Any]:
    one = _schema(draw, depth=depth - 1)
    pair = {"type": "array", "prefixItems": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/one"}], "items": False, "minItems": 2}
    return {"$defs": {"one": one}, **pair}
