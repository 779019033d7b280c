"""JSON schemas read into `engine.regular.expression`, where every text of the language validates. Knows no tokens.

Taken are schemas all of whose keywords stand in `_KEYWORDS` and mean here what they mean in JSON Schema; anything else raises
`NotRegularError`, and nothing is ever ignored but annotations. Two things are narrower than the schema allows: between the parts of a
JSON text stands one space or none, and an object that lists `properties` and says nothing of others has no others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.regular.expression import (
    EMPTY,
    MOST_POSITIONS,
    NEVER,
    Expression,
    Ranges,
    TooLargeError,
    alt,
    char_set,
    chars,
    common,
    complement,
    cut,
    optional,
    repeat,
    seq,
    text,
)
from engine.regular.pattern import NotRegularError, read_pattern

Schema = Mapping[str, Any]

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$schema")
)
_DEFINITIONS = ("$defs", "definitions")
_KEYWORDS: dict[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "number": frozenset(),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "string": frozenset(("minLength", "maxLength", "pattern")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "object": frozenset(("properties", "required", "additionalProperties")),
}
_CONTROLS: Ranges = ((0x00, 0x1F), (0x7F, 0x7F))
_SPECIAL: Ranges = ((0x22, 0x22), (0x5C, 0x5C))
_SHORT = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_SPACE = optional(text(" "))
_DIGIT = chars(((0x30, 0x39),))
_NATURAL = alt(text("0"), seq(chars(((0x31, 0x39),)), repeat(_DIGIT, 0, None)))
_INTEGER = seq(optional(text("-")), _NATURAL)
_FRACTION = optional(seq(text("."), repeat(_DIGIT, 1, None)))
_EXPONENT = optional(
    seq(chars(char_set([(0x45, 0x45), (0x65, 0x65)])), optional(alt(text("+"), text("-"))), repeat(_DIGIT, 1, None))
)
_NUMBER = seq(_INTEGER, _FRACTION, _EXPONENT)
_MOST_REFERENCES = 1000


def read_schema(source: str) -> Expression:
    """Read a schema, given as JSON text. Raise `NotRegularError`."""
    root = json.loads(source)
    try:
        return _Reader(root).value(root)
    except (RecursionError, ValueError, OverflowError) as error:
        raise NotRegularError(str(error)) from error


def string_char(ranges: Ranges) -> Expression:
    """One character out of a set, as it stands between the quotation marks of a JSON string."""
    plain = chars(cut(cut(ranges, _CONTROLS), _SPECIAL))
    controls = [point for low, high in common(ranges, _CONTROLS) for point in range(low, high + 1)]
    letters = [chr(low) for low, _ in common(ranges, _SPECIAL)] + [_SHORT[chr(one)] for one in controls if chr(one) in _SHORT]
    # By their last digit, which most first ones have in common: written one by one they would be most of a long string's automaton.
    lasts: dict[str, str] = {}
    for point in controls:
        first, last = f"{point >> 4:x}", f"{point & 15:x}"
        lasts[first] = lasts.get(first, "") + last
    firsts: dict[str, str] = {}
    for first, several in lasts.items():
        firsts[several] = firsts.get(several, "") + first
    coded = alt(*(seq(_one_of(several), _one_of(last + last.upper())) for last, several in firsts.items()))
    return alt(plain, seq(text("\\"), alt(_one_of("".join(letters)), seq(text("u00"), coded))))


def _one_of(letters: str) -> Expression:
    return chars(char_set([(ord(letter), ord(letter)) for letter in letters]))


_ANY_CHAR = string_char(complement(()))


class _Reader:
    """Reads the parts of one schema, whose definitions they may refer to."""

    def __init__(self, root: Any) -> None:
        self._root = root
        draft = str(root.get("$schema", "")) if isinstance(root, Mapping) else ""
        self._is_old = "draft-0" in draft or "2019-09" in draft
        self._open: list[str] = []
        self._references = 0
        self._read: dict[str, Expression] = {}

    def value(self, schema: Any) -> Expression:
        """Read any schema."""
        if not isinstance(schema, Mapping) or not schema:
            raise NotRegularError("anything at all")
        says = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
        if schema is self._root:
            says = {name: value for name, value in says.items() if name not in _DEFINITIONS}
        for keyword, read in (("$ref", self._reference), ("anyOf", self._any_of), ("allOf", self._all_of)):
            if keyword in says:
                if len(says) > 1:
                    raise NotRegularError(f"{keyword} beside others")
                return read(says[keyword])
        kinds = says.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if "enum" in says or "const" in says:
            return _constants(says, kinds)
        if not isinstance(kinds, list) or not kinds or not all(kind in _KEYWORDS for kind in kinds):
            raise NotRegularError("no type")
        if says.keys() - {"type"} - frozenset().union(*(_KEYWORDS[kind] for kind in kinds)):
            raise NotRegularError("a keyword that isn't known, or not of this type")
        return alt(*(self._of_type(kind, says) for kind in kinds))

    def _of_type(self, kind: str, says: Schema) -> Expression:
        plain = {"null": text("null"), "boolean": alt(text("true"), text("false")), "number": _NUMBER}
        if kind in plain:
            return plain[kind]
        readers: dict[str, Callable[[Schema], Expression]] = {
            "integer": _integer,
            "string": _string,
            "array": self._array,
            "object": self._object,
        }
        return readers[kind](says)

    def _reference(self, reference: Any) -> Expression:
        if not isinstance(reference, str) or not reference.startswith("#/") or "~" in reference or "%" in reference:
            raise NotRegularError("a reference to elsewhere")
        self._references += 1
        if reference in self._open or self._references > _MOST_REFERENCES:
            raise NotRegularError("recursion")
        if reference in self._read:
            return self._read[reference]
        found = self._root
        for name in reference[2:].split("/"):
            if not isinstance(found, Mapping) or name not in found:
                raise NotRegularError("a reference to nothing")
            found = found[name]
        self._open.append(reference)
        read = self._read[reference] = self.value(found)
        self._open.pop()
        return read

    def _any_of(self, options: Any) -> Expression:
        if not isinstance(options, list) or not options:
            raise NotRegularError("anyOf of nothing")
        return alt(*map(self.value, options))

    def _all_of(self, options: Any) -> Expression:
        if not isinstance(options, list) or len(options) != 1:
            raise NotRegularError("an intersection")
        return self.value(options[0])

    def _array(self, says: Schema) -> Expression:
        first = says.get("prefixItems", [])
        if first and self._is_old:
            raise NotRegularError("prefixItems, which is no keyword there: `items` speaks of the first ones as well")
        least, most = _count(says, "minItems"), _count(says, "maxItems", unbounded=True)
        if not isinstance(first, list) or least is None:
            raise NotRegularError("prefixItems that are no list")
        heads = [self.value(schema) for schema in first]
        rest = says.get("items", True)
        if rest is False or (most is not None and most <= len(heads)):
            most = len(heads) if most is None else min(most, len(heads))
            item: Expression = NEVER
        else:
            item = self.value(rest)
        return seq(text("["), _SPACE, _listed(heads, item, least, most), text("]"))

    def _object(self, says: Schema) -> Expression:
        properties, required = says.get("properties", {}), says.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise NotRegularError("an object that isn't described")
        others = says.get("additionalProperties", not properties)
        if others is not False or not set(required) <= properties.keys():
            raise NotRegularError("properties that aren't listed")
        members = [
            (seq(_constant(name), _SPACE, text(":"), _SPACE, self.value(schema), _SPACE), name in required)
            for name, schema in properties.items()
        ]
        return seq(text("{"), _SPACE, _members(members), text("}"))


_COMMA = seq(text(","), _SPACE)


def _members(members: Sequence[tuple[Expression, bool]]) -> Expression:
    """List members in order; those that aren't required may be left out. Each brings the space behind it."""
    needed = next((number for number, (_, required) in enumerate(members) if required), None)
    behind = [seq(_COMMA, member) if required else optional(seq(_COMMA, member)) for member, required in members]
    if needed is not None:
        before = [optional(seq(member, _COMMA)) for member, _ in members[:needed]]
        return seq(*before, members[needed][0], *behind[needed + 1 :])
    # Whichever comes first has no comma before it. Counted first: the options are as long together as their number squared.
    if sum((number + 1) * one.size for number, one in enumerate(behind)) > MOST_POSITIONS:
        raise TooLargeError
    return alt(EMPTY, *(seq(member, *behind[number + 1 :]) for number, (member, _) in enumerate(members)))


def _listed(heads: Sequence[Expression], item: Expression, least: int, most: int | None) -> Expression:
    """List items: the first ones each of its own kind, the others all alike."""
    if most is not None and most < least:
        return NEVER
    first, *later = [*heads, item]
    # From the end: what may follow once `number` items are there.
    if not heads:
        after = repeat(seq(_COMMA, item, _SPACE), max(0, least - 1), None if most is None else max(0, most - 1))
    else:
        left = None if most is None else max(0, most - len(heads))
        after = repeat(seq(_COMMA, item, _SPACE), max(0, least - len(heads)), left)
        for number in range(len(heads) - 1, 0, -1):
            following = seq(_COMMA, later[number - 1], _SPACE, after)
            after = NEVER if most is not None and number >= most else following
            after = alt(EMPTY, after) if number >= least else after
    some = NEVER if most == 0 else seq(first, _SPACE, after)
    return some if least else alt(EMPTY, some)


def _string(says: Schema) -> Expression:
    least, most = _count(says, "minLength"), _count(says, "maxLength", unbounded=True)
    pattern = says.get("pattern")
    if pattern is None:
        content = repeat(_ANY_CHAR, least or 0, most)
    elif isinstance(pattern, str) and "minLength" not in says and "maxLength" not in says:
        content = read_pattern(pattern, encode=string_char, around=repeat(_ANY_CHAR, 0, None))
    else:
        raise NotRegularError("a pattern and a length")
    return seq(text('"'), content, text('"'))


def _count(says: Schema, name: str, *, unbounded: bool = False) -> int | None:
    value = says.get(name)
    if value is None and name not in says:
        return None if unbounded else 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NotRegularError(f"{name} that is no count")
    return value


def _integer(says: Schema) -> Expression:
    low, high = _bound(says, "minimum", math.ceil), _bound(says, "maximum", math.floor)
    above, below = _bound(says, "exclusiveMinimum", math.floor), _bound(says, "exclusiveMaximum", math.ceil)
    lows = [bound for bound in (low, None if above is None else above + 1) if bound is not None]
    highs = [bound for bound in (high, None if below is None else below - 1) if bound is not None]
    if not lows and not highs:
        return _INTEGER
    return integers(max(lows, default=None), min(highs, default=None))


def _bound(says: Schema, name: str, whole: Callable[[float], int]) -> int | None:
    value = says.get(name)
    if name not in says:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NotRegularError(f"{name} that is no number")
    return value if isinstance(value, int) else whole(value)


def integers(low: int | None, high: int | None) -> Expression:
    """Return the integers from `low` to `high`, both included, without leading zeros; None: no bound. -0 is one of them where negative ones are."""
    options: list[Expression] = []
    if low is None or low < 0:
        top = 0 if high is None or high >= 0 else -high
        options.append(seq(text("-"), _naturals(top, None if low is None else -low)))
    if high is None or high >= 0:
        options.append(_naturals(max(0, low or 0), high))
    return alt(*options)


def _naturals(low: int, high: int | None) -> Expression:
    if high is None:
        digits = len(str(low))
        longer = seq(chars(((0x31, 0x39),)), repeat(_DIGIT, digits, None))
        return alt(_naturals(low, 10**digits - 1), longer)
    if high < low:
        return NEVER
    options: list[Expression] = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        options.append(_same_length(str(least), str(min(high, 10**digits - 1))))
    return alt(*options)


def _same_length(low: str, high: str) -> Expression:
    """Return the numbers from `low` to `high`, which have equally many digits."""
    if not low:
        return EMPTY
    left = len(low) - 1
    nines, zeros = "9" * left, "0" * left
    first, last = int(low[0]), int(high[0])
    if first == last:
        return seq(text(low[0]), _same_length(low[1:], high[1:]))
    # First digits that anything may follow are one option: each of its own, they would double with every digit.
    whole_first, whole_last = first + (low[1:] != zeros), last - (high[1:] != nines)
    options = []
    if whole_first > first:
        options.append(seq(text(low[0]), _same_length(low[1:], nines)))
    if whole_first <= whole_last:
        options.append(seq(chars(((0x30 + whole_first, 0x30 + whole_last),)), repeat(_DIGIT, left, left)))
    if whole_last < last:
        options.append(seq(text(high[0]), _same_length(zeros, high[1:])))
    return alt(*options)


def _constants(says: Schema, kinds: list[Any] | None) -> Expression:
    """Read `enum` or `const`, with or without a type that cuts some of them off."""
    if says.keys() - {"type"} not in ({"enum"}, {"const"}):
        raise NotRegularError("constants beside other keywords")
    values = says["enum"] if "enum" in says else [says["const"]]
    if not isinstance(values, list) or not (kinds is None or isinstance(kinds, list)):
        raise NotRegularError("an enum that is no list")
    return alt(*(_constant(value) for value in values if kinds is None or _kind(value) in kinds))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (str, "string"), (int, "integer"), (list, "array"), (dict, "object"))
    for python, kind in kinds:
        if isinstance(value, python):
            return kind
    raise NotRegularError("a fraction, which one type or another may claim")


def _constant(value: Any) -> Expression:
    """Return the text of a JSON value, with room for spaces."""
    if isinstance(value, list):
        return seq(text("["), _SPACE, _members([(seq(_constant(one), _SPACE), True) for one in value]), text("]"))
    if isinstance(value, dict):
        pairs = [(seq(_constant(name), _SPACE, text(":"), _SPACE, _constant(one), _SPACE), True) for name, one in value.items()]
        return seq(text("{"), _SPACE, _members(pairs), text("}"))
    return text(json.dumps(value, ensure_ascii=False, allow_nan=False))
