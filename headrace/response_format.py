"""`GenerationConfig.response_format`: the form that an answer must have, as a frozen value.

Structure is checked here, by every door alike; whether a schema, regex or grammar compiles is found where the tokenizer is,
when a prompt is submitted. This module knows no grammar library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from headrace.errors import InvalidRequest

FormatType = Literal["json_object", "json_schema", "regex", "grammar"]
_PARAM = "response_format"
# Field names of each type, required ones first.
_FIELDS: dict[str, tuple[str, ...]] = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "regex": ("regex",),
    "grammar": ("grammar",),
}
_SCHEMA_FIELDS = ("schema", "name", "description", "strict")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What an answer must match. Written by users as the mapping that `to_dict` gives back."""

    type: FormatType
    source: str = ""
    """The schema as JSON text (its keys in the caller's order, which is the order of the answer), the regex or the grammar."""
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Kept for who sends it; the schema is always held to, whatever it says."""

    WIRE_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "type": {"enum": list(_FIELDS)},
            "json_schema": {
                "type": "object",
                "properties": {
                    "schema": {"type": "object"},
                    "name": {"type": "string"},
                    "description": {"type": "string"},
                    "strict": {"type": "boolean"},
                },
                "required": ["schema"],
            },
            "regex": {"type": "string"},
            "grammar": {"type": "string"},
        },
        "required": ["type"],
        "additionalProperties": False,
    }

    @classmethod
    def parse(cls, value: object) -> Self | None:
        """Read a mapping; None and {"type": "text"} are no constraint. Raise `InvalidRequest` naming `response_format`."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(f"must be an object with a type, not {type(value).__name__}")
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in _FIELDS:
            raise _wrong(f"has no type {kind!r}; its types are {', '.join(_FIELDS)}")
        unknown = [str(name) for name in value if name not in ("type", *_FIELDS[kind])]
        if unknown:
            raise _wrong(f"of type {kind!r} has no field {unknown[0]!r}")
        missing = [name for name in _FIELDS[kind] if name not in value]
        if missing:
            raise _wrong(f"of type {kind!r} needs the field {missing[0]!r}")
        if kind == "text":
            return None
        if kind == "json_object":
            return cls("json_object")
        if kind == "json_schema":
            return cls._of_schema(value["json_schema"])
        return cls("regex" if kind == "regex" else "grammar", _text(kind, value[kind]))

    @classmethod
    def _of_schema(cls, value: object) -> Self:
        if not isinstance(value, Mapping) or not isinstance(value.get("schema"), Mapping):
            raise _wrong("needs json_schema to be an object whose field 'schema' is a JSON schema (an object)")
        unknown = [str(name) for name in value if name not in _SCHEMA_FIELDS]
        if unknown:
            raise _wrong(f"has no field {unknown[0]!r} in json_schema; its fields are {', '.join(_SCHEMA_FIELDS)}")
        name, description, strict = (value.get(field) for field in _SCHEMA_FIELDS[1:])
        for field, text in (("name", name), ("description", description)):
            if not (text is None or isinstance(text, str)):
                raise _wrong(f"needs json_schema.{field} to be a string")
        if not (strict is None or isinstance(strict, bool)):
            raise _wrong("needs json_schema.strict to be true or false")
        try:
            source = json.dumps(value["schema"], allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _wrong(f"needs a schema that is JSON: {error}") from error
        return cls("json_schema", _text("json_schema", source), name, description, strict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready mapping that `parse` reads."""
        if self.type == "json_object":
            return {"type": "json_object"}
        if self.type != "json_schema":
            return {"type": self.type, self.type: self.source}
        named = {"name": self.name, "description": self.description, "strict": self.strict}
        schema = {name: value for name, value in named.items() if value is not None}
        return {"type": "json_schema", "json_schema": {**schema, "schema": json.loads(self.source)}}

    @classmethod
    def __get_pydantic_json_schema__(cls, *_: object) -> dict[str, Any]:
        """Show OpenAPI the mapping that users write, not how it is kept."""
        return cls.WIRE_SCHEMA


def _text(kind: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(f"of type {kind!r} needs a non-empty string")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise _wrong(f"of type {kind!r} is not valid Unicode text: {error}") from error
    if size > _MOST_BYTES:
        raise _wrong(f"of type {kind!r} has {size} bytes; the most is {_MOST_BYTES}")
    return value


def _wrong(rule: str) -> InvalidRequest:
    return InvalidRequest(f"{_PARAM} {rule}", param=_PARAM)
