"""What is open, what of it is under way, and what waits too long: the figures that an operator is alarmed by.

Read from batches that are open and chunks that were sent, however many are over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, case, func, select

from headrace.store.session import Database
from headrace.store.tables import IN_FLIGHT, OPEN, batches, chunks, now
from headrace.store.values import ChunkState

STALL_S = 120.0
"""Chunks that wait in Redis for longer, while no worker has one, are waiting for workers that live and don't take any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """One model's work; seconds by the database's clock."""

    model: str
    batches: dict[str, int]
    """How many are open, by status."""
    open_prompts: int
    """Of batches whose prompts are all stored: those without an answer."""
    unsent: int = 0
    """Chunks that wait in the database."""
    sent: int = 0
    """Chunks that wait in Redis."""
    held: int = 0
    """Chunks that a worker has a live lease of."""
    lapsed: int = 0
    """Chunks whose lease ran out: they are sent again."""
    oldest_sent_s: float = 0.0
    """For how long the oldest of those that wait in Redis has."""
    deadline_s: float
    """Until the first window is over; negative where that should have been noticed."""

    @property
    def is_stalled(self) -> bool:
        """Whether chunks wait and nobody takes them."""
        return self.sent > 0 and self.held == 0 and self.oldest_sent_s > STALL_S


class Pulses:
    """The pulses of one store's models."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self) -> dict[str, Pulse]:
        """Return those of models that have open batches."""
        return self._database.read(_read)


def _read(connection: Connection) -> dict[str, Pulse]:
    left = batches.c.total - batches.c.completed - batches.c.failed
    opened = select(
        batches.c.model,
        batches.c.status,
        func.count().label("number"),
        func.sum(case((batches.c.total > 0, left), else_=0)).label("prompts"),
        func.sum(batches.c.open_chunks).label("chunks"),
        (func.min(batches.c.expires_at) - now()).label("deadline_s"),
    ).where(OPEN)
    facts: dict[str, dict[str, Any]] = {}
    for row in connection.execute(opened.group_by(batches.c.model, batches.c.status)):
        fact = facts.setdefault(row.model, {"batches": {}, "open_prompts": 0, "unsent": 0, "deadline_s": row.deadline_s})
        fact["batches"][row.status] = row.number
        fact["open_prompts"] += int(row.prompts)
        fact["unsent"] += int(row.chunks)
        fact["deadline_s"] = min(fact["deadline_s"], row.deadline_s)
    lives = case((chunks.c.lease_until >= now(), 1), else_=0)
    under_way = select(
        chunks.c.model,
        chunks.c.state,
        func.count().label("number"),
        func.sum(lives).label("live"),
        (now() - func.min(chunks.c.sent_at)).label("oldest_s"),
    ).where(IN_FLIGHT)
    for row in connection.execute(under_way.group_by(chunks.c.model, chunks.c.state)):
        if row.model not in facts:  # its last batch has ended between the two
            continue
        fact = facts[row.model]
        fact["unsent"] = max(0, fact["unsent"] - row.number)
        if row.state == ChunkState.QUEUED:
            fact |= {"sent": row.number, "oldest_sent_s": max(0.0, row.oldest_s)}
        elif row.state == ChunkState.LEASED:
            fact |= {"held": int(row.live), "lapsed": row.number - int(row.live)}
    return {model: Pulse(model=model, **fact) for model, fact in facts.items()}
