"""Finds the prompt that kills engines, and blames nobody else.

    the engine dies ─▶ everybody inside is a suspect ─▶ each runs alone until its first token ─▶ acquitted, back in the line
                                                            │ dies again, and once more alone
                                                            ▼
                                              convicted ─▶ the engine proves that it works ─▶ guilty

So a prompt that kills at its first step costs three engines: one in company, two alone. Short trials, because most engines that die
were killed by something else (an operator, the kernel's memory killer), and a full window of innocents must be through in seconds.
Who died in company a second time, and the first time nobody was found guilty of it, is tried in full: in halves, each run to its
end. A suspect that died alone lets some others go first, so that somebody who kills engines every few seconds hits another one
each time; only some, so that verdicts come, however many are guilty. And an engine that dies of everything, of the simplest request too, convicts nobody.

This module doesn't know processes, or what an item is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")
LONE_DEATHS: Final = 2
"""Engines that have to die with nobody but the suspect inside."""
OTHERS_FIRST: Final = 16
"""Suspects that are tried between the two. If all of them are guilty, so many engines die in a row before the first verdict: fewer than
the supervisor takes for an engine that doesn't work (`Limits.max_deaths`)."""


class Quarantine(Generic[T]):
    """The groups of suspects that wait for their trial, and the one on trial. Items are compared by identity."""

    def __init__(self) -> None:
        """Start with nobody accused."""
        self._groups: deque[tuple[T, ...]] = deque()
        self._on_trial: tuple[T, ...] = ()
        self._lone_deaths: dict[T, int] = {}
        self._convicted: deque[T] = deque()
        # Of this round, which ends when nobody is accused any more.
        self._accused: set[T] = set()
        self._has_guilty = False
        # Died in company in a round that found nobody guilty: they may kill later than at their first token.
        self._unexplained: set[T] = set()

    @property
    def is_open(self) -> bool:
        """Whether somebody is accused."""
        return bool(self._groups or self._on_trial or self._convicted)

    @property
    def has_waiting(self) -> bool:
        """Whether somebody waits for the end of this trial."""
        return bool(self._groups or self._convicted)

    @property
    def awaits_proof(self) -> bool:
        """Whether the next to run is a request that every engine can do."""
        return bool(self._convicted)

    @property
    def in_short_trial(self) -> T | None:
        """The suspect that is acquitted by its first token; None: the trial is in full, or there is none."""
        is_short = len(self._on_trial) == 1 and self._on_trial[0] not in self._unexplained
        return self._on_trial[0] if is_short else None

    def accuse(self, victims: Sequence[T]) -> None:
        """Take those who were in an engine that died: each to be tried alone, or in halves where that was tried before."""
        again = [item for item in victims if item in self._unexplained]
        self._groups.extend((item,) for item in victims if item not in self._unexplained)
        self._groups.extend(_halves(again))
        self._accused.update(victims)

    def try_next(self) -> Sequence[T]:
        """Begin the next group's trial: run it, and nothing else, until it is acquitted or dies."""
        self._on_trial = self._groups.popleft() if self._groups else ()
        return self._on_trial

    def acquit(self) -> None:
        """End the trial: the group came through."""
        for item in self._on_trial:
            self._lone_deaths.pop(item, None)
        self._on_trial = ()
        self._end_round()

    def judge(self, victims: Sequence[T]) -> None:
        """End the trial by the engine's death. `victims`: who of the group was still inside."""
        was_alone = len(self._on_trial) == 1
        self._on_trial = ()
        if not was_alone:
            self._groups.extendleft(reversed(_halves(victims)))
        for item in victims if was_alone else ():
            self._lone_deaths[item] = self._lone_deaths.get(item, 0) + 1
            if self._lone_deaths[item] >= LONE_DEATHS:
                self._convicted.append(item)
            else:
                self._groups.insert(OTHERS_FIRST, (item,))
        self._end_round()

    def prove(self) -> list[T]:
        """Return who is guilty, now that the engine was seen to work."""
        guilty = list(self._convicted)
        self._convicted.clear()
        self._has_guilty = self._has_guilty or bool(guilty)
        self._end_round()
        return guilty

    def forget(self, item: T) -> None:
        """Let an item go that is answered."""
        self._unexplained.discard(item)
        self._lone_deaths.pop(item, None)

    def release_all(self) -> None:
        """Give up all trials."""
        self._groups.clear()
        self._convicted.clear()
        self._accused.clear()
        self._on_trial = ()

    def _end_round(self) -> None:
        if self.is_open or not self._accused:
            return
        if self._has_guilty:
            self._unexplained -= self._accused
        else:
            self._unexplained |= self._accused
        self._accused.clear()
        self._has_guilty = False


def _halves(suspects: Sequence[T]) -> list[tuple[T, ...]]:
    half = (len(suspects) + 1) // 2
    return [tuple(group) for group in (suspects[:half], suspects[half:]) if group]
