"""Regular languages as trees: characters, sequences, choices, repetitions. Knows no syntax, no JSON and no automaton.

What can match nothing at all is folded away where it is built (`NEVER`), so that in the automaton made of a tree every state can
still be completed. A tree knows its size: one that is too large for an automaton is given up where it is built (`TooLargeError`), because
parts that stand in it many times over make it grow as a power of how deep a format nests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Ranges = tuple[tuple[int, int], ...]
"""Code points as ascending, disjoint, inclusive ranges."""

_SURROGATES = (0xD800, 0xDFFF)
_LAST = 0x10FFFF
MOST_POSITIONS = 1 << 16
"""Characters of a tree, each counted as often as it stands in it."""


class TooLargeError(Exception):
    """A tree has more characters than `MOST_POSITIONS`, or its automaton too many states, or takes too long to make."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set."""

    ranges: Ranges
    size: int = field(default=1, init=False, compare=False)


@dataclass(frozen=True, slots=True)
class Seq:
    """One part after the other; no parts: the empty text."""

    parts: tuple[Expression, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _checked(sum(part.size for part in self.parts)))


@dataclass(frozen=True, slots=True)
class Alt:
    """Any one of the options; no options: nothing matches."""

    options: tuple[Expression, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _checked(sum(option.size for option in self.options)))


@dataclass(frozen=True, slots=True)
class Repeat:
    """`least` to `most` times the part; `most` None: any number."""

    part: Expression
    least: int
    most: int | None
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        times = self.least + 1 if self.most is None else self.most
        object.__setattr__(self, "size", _checked(self.part.size * times))


Expression = Chars | Seq | Alt | Repeat


def _checked(size: int) -> int:
    if size > MOST_POSITIONS:
        raise TooLargeError
    return size


EMPTY = Seq(())
NEVER = Alt(())


def char_set(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Put ranges in order, join those that touch, and leave out surrogates, which no UTF-8 text holds."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return cut(tuple(joined), (_SURROGATES,))


def complement(ranges: Ranges) -> Ranges:
    """Return all characters that are not in a set."""
    return cut(((0, _SURROGATES[0] - 1), (_SURROGATES[1] + 1, _LAST)), ranges)


def cut(ranges: Ranges, without: Ranges) -> Ranges:
    """Return the first set without the second."""
    left: list[tuple[int, int]] = []
    for low, high in ranges:
        for cut_low, cut_high in without:
            if cut_high < low or cut_low > high:
                continue
            if cut_low > low:
                left.append((low, cut_low - 1))
            low = cut_high + 1  # noqa: PLW2901  # what is left of the range
        if low <= high:
            left.append((low, high))
    return tuple(left)


def common(ranges: Ranges, others: Ranges) -> Ranges:
    """Return what is in both sets."""
    return tuple(
        (max(low, other_low), min(high, other_high))
        for low, high in ranges
        for other_low, other_high in others
        if max(low, other_low) <= min(high, other_high)
    )


def chars(ranges: Ranges) -> Expression:
    """One character out of a set, which may be empty."""
    return Chars(ranges) if ranges else NEVER


def text(literal: str) -> Expression:
    """Exactly this text, without surrogates (ValueError)."""
    if any(_SURROGATES[0] <= ord(letter) <= _SURROGATES[1] for letter in literal):
        raise ValueError("a lone surrogate is no text")
    return Seq(tuple(Chars(((ord(letter), ord(letter)),)) for letter in literal))


def seq(*parts: Expression) -> Expression:
    """Return the parts one after the other."""
    if NEVER in parts:
        return NEVER
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Seq) else (part,))]
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def alt(*options: Expression) -> Expression:
    """Return any one of the options."""
    # Before they are compared: that looks at all of each of them.
    _checked(sum(option.size for option in options))
    possible = tuple(dict.fromkeys(option for option in options if option != NEVER))
    return possible[0] if len(possible) == 1 else Alt(possible)


def repeat(part: Expression, least: int, most: int | None) -> Expression:
    """Return the part `least` to `most` times."""
    if most is not None and most < least:
        return NEVER
    if part == NEVER:
        return NEVER if least else EMPTY
    if most == 0 or part == EMPTY:
        return EMPTY
    return part if (least, most) == (1, 1) else Repeat(part, least, most)


def optional(part: Expression) -> Expression:
    """Return the part or nothing."""
    return repeat(part, 0, 1)
