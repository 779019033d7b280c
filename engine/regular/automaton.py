"""Expressions made into deterministic automata over the bytes of UTF-8. Knows no tokens and no device.

By the textbook: positions with ranges of bytes between them (Thompson), then sets of positions (Rabin and Scott). No step after that
makes it minimal; characters share their last bytes where they are laid out, which leaves little to gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.regular.expression import MOST_POSITIONS, Alt, Chars, Expression, Ranges, Repeat, Seq, TooLargeError

START = 0
DEAD = -1
MOST_STATES = 8192
"""A token mask for each is kept on the device: 50 MB for a vocabulary of 49,152, 155 MB for 151,936."""
_MOST_WORK = 1 << 19
"""Edges and members of sets that are looked at: a form of 8,192 states needs a fifth of it, a regex made to blow up stops after a second."""


class Automaton(NamedTuple):
    """States 0 .. n-1, of which 0 is the start. From each of them a text of the language can be completed."""

    next_n256: npt.NDArray[np.int16]
    """State after each byte; -1: no text of the language goes on so."""
    final_n: npt.NDArray[np.bool_]
    """Whether a text may end here."""

    @property
    def size(self) -> int:
        """Number of states."""
        return len(self.final_n)

    def walk(self, data: bytes, state: int = START) -> int:
        """Return the state after some bytes; `DEAD`: they don't belong to any text of the language."""
        for byte in data:
            if state == DEAD:
                break
            state = int(self.next_n256[state, byte])
        return state

    def accepts(self, data: bytes) -> bool:
        """Whether these bytes are a text of the language."""
        state = self.walk(data)
        return state != DEAD and bool(self.final_n[state])


class _Edge(NamedTuple):
    low: int
    high: int
    target: int


class _Positions:
    """The nondeterministic automaton: bytes lead from position to position, and some lead on by themselves."""

    def __init__(self) -> None:
        self.edges: list[list[_Edge]] = []
        self.free: list[list[int]] = []

    def new(self) -> int:
        if len(self.edges) >= MOST_POSITIONS:
            raise TooLargeError
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def add(self, expression: Expression, end: int) -> int:
        """Lay an expression out before `end`; return where it begins."""
        if isinstance(expression, Chars):
            return self._add_chars(expression.ranges, end)
        if isinstance(expression, Seq):
            for part in reversed(expression.parts):
                end = self.add(part, end)
            return end
        if isinstance(expression, Alt):
            begin = self.new()
            self.free[begin] = [self.add(option, end) for option in expression.options]
            return begin
        return self._add_repeat(expression, end)

    def _add_repeat(self, expression: Repeat, end: int) -> int:
        begin = end
        if expression.most is None:
            begin = self.new()
            self.free[begin] = [end, self.add(expression.part, begin)]
        else:
            for _ in range(expression.most - expression.least):
                # Each leads to the end itself, not by way of all that follow: else the last ones would be reached by long ways.
                again = self.new()
                self.free[again] = [end, self.add(expression.part, begin)]
                begin = again
        for _ in range(expression.least):
            begin = self.add(expression.part, begin)
        return begin

    def _add_chars(self, ranges: Ranges, end: int) -> int:
        begin = self.new()
        shared: dict[tuple[tuple[int, int], ...], int] = {(): end}
        for low, high in ranges:
            for first, *rest in utf8_sequences(low, high):
                self.edges[begin].append(_Edge(*first, self._tail(tuple(rest), shared)))
        return begin

    def _tail(self, tail: tuple[tuple[int, int], ...], shared: dict[tuple[tuple[int, int], ...], int]) -> int:
        if tail not in shared:
            after = self._tail(tail[1:], shared)
            shared[tail] = self.new()
            self.edges[shared[tail]].append(_Edge(*tail[0], after))
        return shared[tail]


def utf8_sequences(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Split a range of code points (no surrogates) into sequences of byte ranges that match exactly their UTF-8."""
    for last in (0x7F, 0x7FF, 0xFFFF):
        if low <= last < high:
            yield from utf8_sequences(low, last)
            low = last + 1
    size = len(chr(high).encode())
    for tail in range(1, size):
        # All of a block of 64, 4,096, … must be in, or the block is split off.
        mask = (1 << (6 * tail)) - 1
        if (low & ~mask) != (high & ~mask):
            if low & mask:
                yield from utf8_sequences(low, low | mask)
                yield from utf8_sequences((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from utf8_sequences(low, (high & ~mask) - 1)
                yield from utf8_sequences(high & ~mask, high)
                return
    yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


def compile_expression(expression: Expression, *, most_states: int = MOST_STATES) -> Automaton | None:
    """Make an automaton; None: nothing matches. Raise `TooLargeError` where it would have more than `most_states` states."""
    if expression == Alt(()):
        return None
    positions = _Positions()
    end = positions.new()
    closures = _Closures(positions, end)
    first = closures.of([positions.add(expression, end)])
    numbers: dict[frozenset[int], int] = {first: START}
    order = [first]
    arrows: list[list[_Edge]] = []
    for here in order:
        leaving: list[_Edge] = []
        edges = [edge for position in here for edge in positions.edges[position]]
        closures.spend(len(here) + len(edges))
        for low, high, targets in _intervals(edges):
            there = closures.of(targets)
            number = numbers.get(there)
            if number is None:
                if len(order) >= most_states:
                    raise TooLargeError
                number = numbers[there] = len(order)
                order.append(there)
            leaving.append(_Edge(low, high, number))
        arrows.append(leaving)
    next_n256 = np.full((len(order), 256), DEAD, dtype=np.int16)
    for number, leaving in enumerate(arrows):
        row = next_n256[number]
        for low, high, target in leaving:
            row[low : high + 1] = target
    return Automaton(next_n256, np.array([end in here for here in order]))


class _Closures:
    """Which positions stand for a set of them once the free ways are gone: those with edges, and the end."""

    def __init__(self, positions: _Positions, end: int) -> None:
        self._positions = positions
        self._end = end
        self._single: dict[int, frozenset[int]] = {}
        self._spent = 0

    def spend(self, work: int) -> None:
        """Count work; raise `TooLargeError` where it has become too much."""
        self._spent += work
        if self._spent > _MOST_WORK:
            raise TooLargeError

    def of(self, targets: Iterable[int]) -> frozenset[int]:
        return frozenset().union(*map(self._of_one, targets))

    def _of_one(self, target: int) -> frozenset[int]:
        found = self._single.get(target)
        if found is None:
            seen = {target}
            todo = [target]
            while todo:
                for after in self._positions.free[todo.pop()]:
                    if after not in seen:
                        seen.add(after)
                        todo.append(after)
            self.spend(len(seen))
            found = frozenset(one for one in seen if self._positions.edges[one] or one == self._end)
            self._single[target] = found
        return found


def _intervals(edges: list[_Edge]) -> Iterator[tuple[int, int, set[int]]]:
    """Cut overlapping edges into intervals of bytes that lead to the same positions."""
    borders = sorted({edge.low for edge in edges} | {edge.high + 1 for edge in edges})
    for low, after in pairwise(borders):
        targets = {edge.target for edge in edges if edge.low <= low and after <= edge.high + 1}
        if targets:
            yield low, after - 1, targets
