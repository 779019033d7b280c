"""How long an engine takes to get ready, part by part. Knows no engine."""

from __future__ import annotations

import time


class Stopwatch:
    """Names the seconds between one call of `lap` and the next."""

    def __init__(self) -> None:
        """Start."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Give what passed since the last lap a name; a name used again adds up."""
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 3)
        self._last = now
