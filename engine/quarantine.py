"""Finds the prompt that kills engines: suspects run in halves, until the one that is alone dies again.

Everybody else is kept out meanwhile, so that a guilty prompt takes no more innocent ones with it. N suspects cost about log2(N)
deaths. This module doesn't know processes or what an item is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Quarantine(Generic[T]):
    """The groups of suspects that wait for their trial, and the one on trial."""

    def __init__(self) -> None:
        """Start with nobody accused."""
        self._groups: deque[list[T]] = deque()
        self._on_trial: list[T] = []

    @property
    def is_open(self) -> bool:
        """Whether somebody is accused."""
        return bool(self._groups or self._on_trial)

    def accuse(self, suspects: Sequence[T]) -> None:
        """Put suspects, who died together, into two groups; the next ones to be tried."""
        half = (len(suspects) + 1) // 2
        self._groups.extendleft(list(group) for group in (suspects[half:], suspects[:half]) if group)

    def try_next(self) -> Sequence[T]:
        """Begin the next group's trial: run it, and nothing else, until it is finished or dies."""
        self._on_trial = self._groups.popleft() if self._groups else []
        return tuple(self._on_trial)

    def acquit(self) -> None:
        """End the trial: the group came through."""
        self._on_trial = []

    def judge(self, victims: Sequence[T]) -> T | None:
        """End the trial by death: the only one on trial is guilty; several are accused again. Returns the guilty one."""
        was_alone = len(self._on_trial) == 1
        self._on_trial = []
        if was_alone and victims:
            return victims[0]
        self.accuse(victims)
        return None

    def release_all(self) -> list[T]:
        """Give up all trials; return who waited for one."""
        waiting = [suspect for group in self._groups for suspect in group]
        self._groups.clear()
        self._on_trial = []
        return waiting
