"""Checks that configuration classes share, and their form on a wire. Every refusal names the field and the rule.

This module knows no field of any class.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from headrace.errors import InvalidRequest

MOST = 2**31 - 1
"""Bound of every count and token id: they travel as int32 tensors, and one that overflows there would take its whole plan down."""


def check(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise `InvalidRequest` for the field `name` unless `ok`; `rule` completes "must be"."""
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
        raise InvalidRequest(f"{name} must be {rule}, not {shown}", param=name)


def is_int(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether it is a whole number from `low` to `high`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> bool:
    """Whether it is a finite number from `low` to `high`."""
    # Not math.isfinite(): it raises OverflowError for a whole number that no float holds. NaN fails both comparisons.
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def plain(value: object) -> object:
    """Give numpy's and torch's numbers and arrays as Python's; anything else as it is."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def words(name: str, value: object) -> tuple[str, ...]:
    """Accept None, one word or a sequence of words, because users write all three; give a tuple."""
    if value is None:
        return ()
    given: list[object] = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
    texts = tuple(text for text in given if isinstance(text, str) and text)
    check(len(texts) == len(given), name, value, "a list of non-empty strings")
    for text in texts:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidRequest(
                f"{name} has a text that is not valid Unicode, {text!r:.80}: no answer ever has half of a surrogate pair in it; "
                "cut texts between whole characters",
                param=name,
            )
    return texts


def ids(name: str, value: object) -> tuple[int, ...]:
    """Accept None, one token id or a sequence of them; give a tuple."""
    if value is None:
        return ()
    value = plain(value)
    tokens = (value,) if is_int(value) else [plain(one) for one in value] if isinstance(value, list | tuple) else value
    check(isinstance(tokens, list | tuple) and all(is_int(i, 0, MOST) for i in tokens), name, value, "a list of token ids")
    return tuple(tokens)  # type: ignore[arg-type]  # checked on the line above


class Wire:
    """`to_dict` and `from_dict` for dataclasses whose fields are JSON values or have a `to_dict`."""

    __slots__ = ()
    # pydantic reads this where it validates the same dataclass at the HTTP rim; the docstrings become OpenAPI descriptions.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    def take_plain_numbers(self) -> None:
        """Turn what numpy or torch made of a field into Python's: sizes are often computed, and none of theirs travels as JSON."""
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, spec.name)
            if (taken := plain(value)) is not value:
                object.__setattr__(self, spec.name, taken)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready fields that differ from their defaults."""
        out: dict[str, Any] = {}
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, spec.name)
            default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
            if value != default:
                value = value.to_dict() if hasattr(value, "to_dict") else value
                out[spec.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from a mapping. Raise `InvalidRequest` naming a field that doesn't exist or is out of range."""
        if not isinstance(data, Mapping):
            raise InvalidRequest(f"{cls.__name__} must be an object, not {type(data).__name__}")
        known = {spec.name for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(str(name) for name in set(data) - known)
        if unknown:
            raise InvalidRequest(
                f"{cls.__name__} has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}", param=unknown[0]
            )
        return cls(**data)
