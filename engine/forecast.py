"""How much KV the running requests will need at their worst moment, and how long outputs become. Numbers only.

Reserving `max_new_tokens` for each request leaves most of the pool empty; reserving nothing preempts all the time. So a
request is admitted when the *future peak* stays within the pool. With expected remaining lengths l_1 >= l_2 >= ... and
present sizes h_j, requests 1..i are still there when the i-th ends, and then hold sum_{j<=i} h_j + i * l_i tokens; the peak
is the largest of these sums.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

LEARN_AFTER = 200
"""Completions seen before their lengths are believed."""
KEEP = 2000
"""Completions remembered, so that a new kind of batch replaces the old one's lengths."""
REFRESH_EVERY = 50


class Load(NamedTuple):
    """One request's share of the forecast, in tokens."""

    left: int
    """Still to be generated, as expected."""
    size: int
    """KV positions it holds already (or takes on admission)."""


class OutputLengths:
    """The distribution of output lengths, learned from completions. Until then: half of what is allowed."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=KEEP)
        self._sorted: list[int] = []
        # _tail_sums[i]: the sum of _sorted[i:]
        self._tail_sums: list[int] = []
        self._seen = 0

    def record(self, length: int) -> None:
        """Learn from a request that ended by itself or at its limit."""
        self._recent.append(length)
        self._seen += 1
        if self._seen >= LEARN_AFTER and (self._seen - LEARN_AFTER) % REFRESH_EVERY == 0:
            self._sorted = sorted(self._recent)
            self._tail_sums = list(accumulate(reversed(self._sorted), initial=0))[::-1]

    def expect_left(self, generated: int, allowed: int) -> int:
        """Return how many more tokens a request is expected to generate, `generated` of `allowed` being there."""
        most = allowed - generated
        longer = bisect_right(self._sorted, generated)
        count = len(self._sorted) - longer
        if count:
            mean = -(-self._tail_sums[longer] // count)
            return min(mean - generated, most)
        # Nothing is known of outputs this long: neither when nothing was learned yet nor when it outlived them all.
        half = -(-allowed // 2) - generated
        return min(most, half if half > 0 else -(-most // 2))


class Forecast:
    """The future peak of a set of requests, one of which may be added at a time."""

    def __init__(self, loads: Iterable[Load], *, capacity: int) -> None:
        """`capacity`: tokens that the pool holds."""
        self._capacity = capacity
        # By -left: the longest first.
        self._loads = sorted((-load.left, load.size) for load in loads)
        self._sum = sum(size - negative for negative, size in self._loads)

    def peak(self) -> int:
        """Return the largest number of tokens held at once."""
        sizes = accumulate(size for _, size in self._loads)
        return max(
            (held - index * negative for index, ((negative, _), held) in enumerate(zip(self._loads, sizes, strict=True), 1)),
            default=0,
        )

    def add(self, load: Load, *, anyway: bool = False) -> bool:
        """Add a request if the peak stays within the capacity, or `anyway`; tell whether it was added."""
        entry = (-load.left, load.size)
        insort(self._loads, entry)
        self._sum += load.left + load.size
        # The sum of all final sizes bounds the peak; while it fits, the exact peak need not be computed.
        if anyway or self._sum <= self._capacity or self.peak() <= self._capacity:
            return True
        self._loads.remove(entry)
        self._sum -= load.left + load.size
        return False
