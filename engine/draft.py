"""A plan in the making: rows and the sequences they belong to, in the order that a plan promises. No policy here."""

from __future__ import annotations

from typing import NamedTuple

from engine.plan import Admission, PlanRow, StepPlan
from engine.sequence import SequenceState


class PlannedStep(NamedTuple):
    """A plan, and whom its sampled tokens belong to."""

    plan: StepPlan
    sampled: tuple[SequenceState, ...]
    """One for each row that samples, in the order of the rows."""
    admitted: tuple[SequenceState, ...]
    scored: tuple[tuple[SequenceState, int], ...] = ()
    """For each row that scores, in the order of the rows: whose it is, and where it starts."""


class PlanDraft:
    """Collects one step's rows."""

    __slots__ = (
        "admitted",
        "admitted_states",
        "budget",
        "chunks",
        "copies",
        "sampled_by_chunks",
        "sampled_by_singles",
        "scored_by_chunks",
        "scored_by_singles",
        "singles",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens that the step may still take."""
        # Rows of one token stand first in a plan, so they are collected apart.
        self.singles: list[PlanRow] = []
        self.chunks: list[PlanRow] = []
        self.sampled_by_singles: list[SequenceState] = []
        self.sampled_by_chunks: list[SequenceState] = []
        self.scored_by_singles: list[tuple[SequenceState, int]] = []
        self.scored_by_chunks: list[tuple[SequenceState, int]] = []
        self.admitted: list[Admission] = []
        self.admitted_states: list[SequenceState] = []
        self.copies: list[tuple[int, int]] = []
        """(source, destination) blocks of the requests that fork."""

    @property
    def is_empty(self) -> bool:
        """Whether the step would compute nothing."""
        return not self.singles and not self.chunks

    def add(self, row: PlanRow, sequence: SequenceState) -> None:
        """Add one row and take its tokens from the budget."""
        single = row.count == 1
        (self.singles if single else self.chunks).append(row)
        if row.samples:
            (self.sampled_by_singles if single else self.sampled_by_chunks).append(sequence)
        if row.scores:
            (self.scored_by_singles if single else self.scored_by_chunks).append((sequence, row.start))
        self.budget -= row.count

    def finish(self, step: int) -> PlannedStep:
        """Freeze it."""
        return PlannedStep(
            StepPlan(step=step, admitted=tuple(self.admitted), copies=tuple(self.copies), rows=(*self.singles, *self.chunks)),
            (*self.sampled_by_singles, *self.sampled_by_chunks),
            tuple(self.admitted_states),
            (*self.scored_by_singles, *self.scored_by_chunks),
        )
