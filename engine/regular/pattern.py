r"""Regular expressions as people write them, read into `engine.regular.expression`, as far as their meaning is beyond doubt.

Python's own parser reads them. Taken are literals, sets, groups, alternatives, greedy and lazy repetitions, `.`, `\d`, `\w`, `\s`
(their ASCII sets, as in ECMA 262) and anchors at the two ends; whatever else there is, and what the dialects read differently,
raises `NotRegularError`. This module knows no JSON beyond an `encode` that it is given.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from re import _constants as code  # type: ignore[attr-defined]  # the names of what the parser gives have no public home
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from engine.regular.expression import Expression, Ranges, alt, char_set, chars, complement, repeat, seq

Encode = Callable[[Ranges], Expression]
"""How one character out of a set stands in the answer."""

_CATEGORIES: dict[Any, Ranges] = {
    code.CATEGORY_DIGIT: ((0x30, 0x39),),
    code.CATEGORY_WORD: ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    code.CATEGORY_SPACE: ((0x09, 0x0D), (0x20, 0x20)),
}
_ANY = complement(((0x0A, 0x0A),))
# Python reads these as it likes (a set within a set, a lower bound left out, octal, an own way to write the end); others don't.
_DOUBTFUL = re.compile(r"\[\^?\[|&&|--|~~|\|\||\{,|\\[0AZzabBGQE]|\\[1-9]|\\N|\(\?[^:]")


class NotRegularError(Exception):
    """Not known to be regular, or not known to mean the same to everybody."""


def read_pattern(source: str, *, encode: Encode = chars, around: Expression | None = None) -> Expression:
    """Read a regular expression. `around`: what may stand before and behind it where it has no anchor there; None: nothing.

    Raise `NotRegularError`.
    """
    if _DOUBTFUL.search(source):
        raise NotRegularError(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = parser.parse(source)
    except (re.error, FutureWarning, DeprecationWarning, RecursionError, OverflowError) as error:
        raise NotRegularError(source) from error
    if tree.state.flags & ~re.UNICODE:
        raise NotRegularError(source)
    return _Reader(encode, around).top(list(tree))


class _Reader:
    def __init__(self, encode: Encode, around: Expression | None) -> None:
        self._encode = encode
        self._around = around

    def top(self, items: Sequence[Any]) -> Expression:
        """Read what may have anchors."""
        starts = bool(items) and items[0] == (code.AT, code.AT_BEGINNING)
        items = items[1:] if starts else items
        if len(items) == 1 and items[0][0] is code.BRANCH and not starts:
            return alt(*(self.top(list(option)) for option in items[0][1][1]))
        ends = bool(items) and items[-1] == (code.AT, code.AT_END)
        body = self._items(items[:-1] if ends else items)
        if self._around is None:
            return body
        return seq(*(() if starts else (self._around,)), body, *(() if ends else (self._around,)))

    def _items(self, items: Sequence[Any]) -> Expression:
        return seq(*(self._item(kind, value) for kind, value in items))

    def _item(self, kind: Any, value: Any) -> Expression:
        one = _one_char(kind, value)
        if one is not None:
            return self._encode(one)
        if kind is code.BRANCH:
            return alt(*(self._items(list(option)) for option in value[1]))
        if kind is code.SUBPATTERN:
            _, added, removed, inner = value
            if not added and not removed:
                return self._items(list(inner))
        if kind in (code.MAX_REPEAT, code.MIN_REPEAT):
            least, most, inner = value
            return repeat(self._items(list(inner)), least, None if most is code.MAXREPEAT else most)
        raise NotRegularError(str(kind))


def _one_char(kind: Any, value: Any) -> Ranges | None:
    """Read what stands for one character; None: it is something else."""
    if kind is code.LITERAL:
        return char_set([(value, value)])
    if kind is code.NOT_LITERAL:
        return complement(((value, value),))
    if kind is code.ANY:
        return _ANY
    return _set(value) if kind is code.IN else None


def _set(members: Sequence[Any]) -> Ranges:
    ranges: list[tuple[int, int]] = []
    for kind, value in members:
        if kind is code.LITERAL:
            ranges.append((value, value))
        elif kind is code.RANGE:
            ranges.append(value)
        elif kind is code.CATEGORY and value in _CATEGORIES:
            ranges += _CATEGORIES[value]
        elif kind is not code.NEGATE:
            raise NotRegularError(str(value))
    negated = members[0][0] is code.NEGATE
    if negated and any(kind is code.CATEGORY for kind, _ in members):
        # Of the larger, Unicode sets the complement is smaller: what isn't \w to us may be to who checks the answer.
        raise NotRegularError("the complement of a class")
    found = char_set(ranges)
    return complement(found) if negated else found
