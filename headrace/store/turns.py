"""Whose chunk is sent next: priorities first, within a priority owners by weight, within an owner batch by batch.

Sharing is start-time fair queueing on two levels. Time is counted in prompts: a chunk of 64 moves its batch's `turn` by 64, and
its lane (an owner at one priority of one model) by 64 over the owner's weight; whoever stands lowest is served. Who was away
begins where the others stand now, so that nobody saves up turns: a batch of ten prompts sent behind a million is served at once.

A higher priority goes before a lower one, except that of `GRACE_OF` chunks one goes to the priorities below, to each of them in turn: a
stream of urgent batches slows the others down, and does not stop them.

What is read is bounded whatever is queued: each distinct (priority, lane) is one step into `ix_batches_turn`, each batch that is
looked at one step into `ix_chunks_unsent`. Every function works inside the caller's transaction. Nothing here knows Redis.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, delete, exists, func, select, text, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from headrace.store.tables import RUNNING, UNSENT, batches, chunks, lanes

GRACE_OF: Final = 16
"""One chunk in so many goes to lower priorities while higher ones have work."""
MOST_LANES: Final = 256
"""Lanes of one model that are looked at: the highest priorities. More would make each look slow."""
GRACE_ROW: Final = -(2**31)
"""The priority under which `lanes` keeps a model's count of chunks (`passed_over`) that went before lower priorities since one of them had
the grace, and which one that was (`clock`)."""
_LOCK_SPACE: Final = 0x7475726E  # "turn": apart from the locks of migrations and of admission

# A skip scan: DISTINCT over the same rows would read every running batch.
_FIND_LANES: Final = text("""
WITH RECURSIVE found(id, priority, lane, place) AS (
    SELECT id, priority, lane, 1 FROM (
        SELECT id, priority, lane FROM batches WHERE status = 'in_progress' AND model = :model
        ORDER BY priority DESC, lane DESC LIMIT 1
    ) AS first
    UNION ALL
    SELECT following.id, following.priority, following.lane, found.place + 1
    FROM found JOIN batches AS following ON following.id = COALESCE(
        (
            SELECT other.id FROM batches AS other
            WHERE other.status = 'in_progress' AND other.model = :model
            AND other.priority = found.priority AND other.lane < found.lane
            ORDER BY other.lane DESC LIMIT 1
        ),
        (
            SELECT other.id FROM batches AS other
            WHERE other.status = 'in_progress' AND other.model = :model AND other.priority < found.priority
            ORDER BY other.priority DESC, other.lane DESC LIMIT 1
        )
    )
    WHERE found.place < :most
)
SELECT found.priority, found.lane, COALESCE(api_keys.weight, 1) AS weight, lanes.began, lanes.ended, lanes.clock
FROM found
LEFT JOIN api_keys ON api_keys.id = found.lane
LEFT JOIN lanes ON lanes.model = :model AND lanes.priority = found.priority AND lanes.lane = found.lane
ORDER BY found.place
""")


@dataclass(slots=True)
class _Batch:
    """A batch with something to send."""

    id: str
    # Filled by `_Picker.take` when its turn comes; None: not read yet.
    chunks: deque[Any] | None = None


@dataclass(slots=True)
class _Lane:
    """An owner at one priority of one model."""

    priority: int
    lane: str
    weight: int = 1
    began: float = 0.0
    ended: float = 0.0
    clock: float = 0.0
    passed_over: int = 0
    # Filled by `_Picker.has_work`, by (turn, age); None: not looked at yet.
    waiting: list[tuple[float, float, str, _Batch]] | None = None
    is_changed: bool = False


@dataclass(slots=True)
class _Picker:
    """Deals out one transaction's chunks, in memory; `save` writes down how far everybody got."""

    connection: Connection
    model: str
    limit: int
    lanes: list[_Lane]
    grace: _Lane
    began: dict[int, float]
    """The virtual time of each priority: where the chunk that was sent last began."""
    turns: dict[str, float] = field(default_factory=dict)

    def has_work(self, lane: _Lane) -> bool:
        """Whether the lane has a chunk to send."""
        if lane.waiting is None:
            found = _find_batches(self.connection, self.model, lane, self.limit)
            lane.waiting = [(max(row.turn, lane.clock), row.created_at, row.id, _Batch(row.id)) for row in found]
            heapq.heapify(lane.waiting)
        return bool(lane.waiting)

    def next_lane(self) -> _Lane | None:
        """Return the lane whose turn it is; None when nobody has anything to send."""
        priorities = sorted({lane.priority for lane in self.lanes}, reverse=True)
        for place, priority in enumerate(priorities):
            if (top := self._first(priority)) is not None:
                return self._below(priorities[place + 1 :]) or top
        return None

    def _below(self, priorities: Sequence[int]) -> _Lane | None:
        """Return the lane that has the grace of a higher priority now; each of the lower `priorities` has it in turn."""
        if not priorities:
            return None
        grace = self.grace
        grace.is_changed = True
        if grace.passed_over < GRACE_OF - 1:
            grace.passed_over += 1
            return None
        grace.passed_over = 0
        for priority in sorted(priorities, key=lambda lower: (lower >= grace.clock, -lower)):
            if (lane := self._first(priority)) is not None:
                grace.clock = priority
                return lane
        return None

    def _first(self, priority: int) -> _Lane | None:
        equals = (lane for lane in self.lanes if lane.priority == priority)
        # In the order of their turn, so that most lanes are not looked into.
        return next(filter(self.has_work, sorted(equals, key=lambda lane: (self._start(lane), lane.lane))), None)

    def _start(self, lane: _Lane) -> float:
        return max(lane.ended, self.began.get(lane.priority, 0.0))

    def take(self, lane: _Lane) -> Row[Any] | None:
        """Take the lane's next chunk and charge it to the lane and to the batch; None: its batch was stopped since it was found."""
        assert lane.waiting
        turn, created_at, batch_id, batch = heapq.heappop(lane.waiting)
        if batch.chunks is None:
            # As many as can be needed, so that no batch is read twice.
            batch.chunks = deque(_find_chunks(self.connection, batch_id, limit=self.limit))
        if not batch.chunks:
            return None
        chunk: Row[Any] = batch.chunks.popleft()
        cost = chunk.stop - chunk.start
        lane.began = self._start(lane)
        lane.ended = lane.began + cost / lane.weight
        lane.clock, lane.is_changed = turn, True
        self.began[lane.priority] = lane.began
        self.turns[batch_id] = turn + cost
        if batch.chunks:
            heapq.heappush(lane.waiting, (turn + cost, created_at, batch_id, batch))
        return chunk

    def save(self) -> None:
        """Write the turns down."""
        if self.turns:
            # `bindparam` names differ from the columns': the columns' own are taken by SET.
            statement = update(batches).where(batches.c.id == bindparam("batch")).values(turn=bindparam("reached"))
            self.connection.execute(
                statement, [{"batch": batch_id, "reached": turn} for batch_id, turn in sorted(self.turns.items())]
            )
        names = ("priority", "lane", "began", "ended", "clock", "passed_over")
        changed = [lane for lane in (*self.lanes, self.grace) if lane.is_changed]
        rows = [{"model": self.model, **{name: getattr(lane, name) for name in names}} for lane in changed]
        if rows:
            self.connection.execute(_upsert(self.connection), rows)


def pick(connection: Connection, *, model: str, limit: int) -> list[str]:
    """Return the ids of up to `limit` chunks of `model` that were never sent, in the order of their turn, and charge them.

    The rows of their batches are locked; the chunks are not marked as sent: that is the caller's.
    """
    _wait_for_turn(connection, model)
    known = connection.execute(_FIND_LANES, {"model": model, "most": MOST_LANES}).all()
    if not known:
        return []
    began = (
        select(lanes.c.priority, func.max(lanes.c.began).label("began"))
        .where(lanes.c.model == model)
        .group_by(lanes.c.priority)
    )
    last = connection.execute(
        select(lanes.c.clock, lanes.c.passed_over).where(lanes.c.model == model, lanes.c.priority == GRACE_ROW)
    ).first()
    picker = _Picker(
        connection, model, limit,
        [_Lane(row.priority, row.lane, row.weight, row.began or 0.0, row.ended or 0.0, row.clock or 0.0) for row in known],
        _Lane(GRACE_ROW, "") if last is None else _Lane(GRACE_ROW, "", clock=last.clock, passed_over=last.passed_over),
        {row.priority: row.began for row in connection.execute(began)},
    )  # fmt: skip
    picked: list[Row[Any]] = []
    while len(picked) < limit and (lane := picker.next_lane()) is not None:
        if (chunk := picker.take(lane)) is not None:
            picked.append(chunk)
    if not picked:
        return []
    # Before the caller's chunks, in the one order that everybody keeps. A batch that was stopped meanwhile drops out.
    touched = select(batches.c.id).where(batches.c.id.in_(picker.turns), RUNNING, batches.c.expiring_at.is_(None))
    running = set(connection.execute(touched.order_by(batches.c.id).with_for_update(key_share=True)).scalars())
    picker.save()
    return [chunk.id for chunk in picked if chunk.batch_id in running]


def forget_idle(connection: Connection) -> int:
    """Delete the lanes that nobody waits in; return how many. Who comes back begins where the others are, as a newcomer does."""
    is_used = exists().where(
        RUNNING, batches.c.model == lanes.c.model, batches.c.priority == lanes.c.priority, batches.c.lane == lanes.c.lane
    )
    key = (lanes.c.model, lanes.c.priority, lanes.c.lane)
    idle = select(*key).where(~is_used, lanes.c.priority != GRACE_ROW).with_for_update(skip_locked=True)
    found = [tuple(row) for row in connection.execute(idle.limit(500))]
    return connection.execute(delete(lanes).where(tuple_(*key).in_(found))).rowcount if found else 0


def _wait_for_turn(connection: Connection, model: str) -> None:
    """Let one transaction at a time deal out a model's chunks: two that read the same turns would charge only one of them."""
    if connection.dialect.name == "sqlite":  # its write lock is held already
        return
    key = int.from_bytes(hashlib.sha256(model.encode()).digest()[:4], "big", signed=True)
    connection.execute(text("SELECT pg_advisory_xact_lock(:space, :key)"), {"space": _LOCK_SPACE, "key": key})


def _find_batches(connection: Connection, model: str, lane: _Lane, limit: int) -> Sequence[Any]:
    # A scalar subquery and no EXISTS, which PostgreSQL may turn into a join over every unsent chunk.
    first = (
        select(chunks.c.number).where(chunks.c.batch_id == batches.c.id, UNSENT).order_by(chunks.c.number).limit(1)
    ).scalar_subquery()
    query = (
        select(batches.c.id, batches.c.turn, batches.c.created_at)
        .where(RUNNING, batches.c.model == model, batches.c.priority == lane.priority, batches.c.lane == lane.lane)
        .where(batches.c.expiring_at.is_(None), first.is_not(None))
        .order_by(batches.c.turn, batches.c.created_at, batches.c.id)
        .limit(limit)
    )
    return connection.execute(query).all()


def _find_chunks(connection: Connection, batch_id: str, *, limit: int) -> Sequence[Any]:
    query = (
        select(chunks.c.id, chunks.c.batch_id, chunks.c.start, chunks.c.stop)
        .where(chunks.c.batch_id == batch_id, UNSENT)
        .order_by(chunks.c.number)
        .limit(limit)
    )
    return connection.execute(query).all()


def _upsert(connection: Connection) -> sqlite.Insert | postgresql.Insert:
    key = ["model", "priority", "lane"]
    insert: Any = sqlite.insert(lanes) if connection.dialect.name == "sqlite" else postgresql.insert(lanes)
    values = {name: insert.excluded[name] for name in ("began", "ended", "clock", "passed_over")}
    done: sqlite.Insert | postgresql.Insert = insert.on_conflict_do_update(index_elements=key, set_=values)
    return done
