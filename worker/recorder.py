"""Completions on their way to SQL: one thread writes the rows of all chunks in flight, many to a transaction.

    engine's reader thread ── Ledger.add ──▶ rows in memory ── flushing thread ──▶ one transaction ──▶ the ledgers of its chunks
                                                   └── that SQL has not taken for a while ──▶ the spool on disk, until it has

Memory is bounded without a limit of its own: a chunk's task ends only when its rows are written, so no more than
`worker_concurrency` chunks of rows can wait here. While the store is away they wait, no new chunk starts, and the engine runs dry.
The spool is their second copy: it is read only by the worker that comes after this one was killed.

This module knows no Celery and no engine.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from headrace.store import RecordStatus
from worker.outage import HEALS, Outage
from worker.spool import Spool, SpoolFull

if TYPE_CHECKING:
    from headrace.completion import Completion
    from headrace.store import Claim, RecordResult, Store

log = logging.getLogger(__name__)


class Verdict(StrEnum):
    """How the work on a claimed chunk ended. Only RECORDED leaves nothing to compute."""

    RECORDED = "recorded"
    """Every pending prompt has its row."""
    FENCED = "fenced"
    """The lease ran out and another worker has the chunk; what this one computes is not wanted any more."""
    CANCELLED = "cancelled"
    """The batch was cancelled or has expired."""
    ENGINE_LOST = "engine_lost"
    """The engine gave up; the rest of the chunk is for another worker."""
    DRAINED = "drained"
    """This worker is going down; the rest of the chunk is handed back."""
    OUT_OF_ROOM = "out_of_room"
    """The store is away and the spool is full; the rest of the chunk is handed back when the store has taken what is ready."""
    BROKEN = "broken"
    """The store refused the rows with an error that no waiting heals."""


class Row(NamedTuple):
    """One completion and the ledger that waits for it."""

    number: int
    """1 for the first row of this process; rows are written in this order."""
    ledger: Ledger
    completion: Completion
    arrived: float


class Ledger:
    """What is still owed to one claimed chunk. All fields are guarded by the recorder's lock."""

    def __init__(self, recorder: Recorder, claim: Claim, *, owed: int) -> None:
        """`owed`: completions that this chunk is waiting for. Made by `Recorder.open`."""
        self.claim = claim
        self.owed = owed
        self.arrived = 0
        self.recorded = 0
        self.failed = 0
        self.tokens = 0
        # Set once, by whoever finds out first; None while work goes on.
        self.verdict: Verdict | None = None if owed else Verdict.RECORDED
        # Set by the flushing thread, with verdict BROKEN.
        self.error: Exception | None = None
        self._recorder = recorder
        self._opened = time.monotonic()

    def add(self, completion: Completion) -> None:
        """Take one completion; returns at once and never raises."""
        self._recorder.take(self, completion)

    def settle(self, verdict: Verdict) -> None:
        """End the work with `verdict`, unless it has ended; rows that arrived before are still written."""
        with self._recorder.changed:
            if self.verdict is None:
                self.verdict = verdict
                self._recorder.changed.notify_all()

    def wait(self, timeout_s: float) -> Verdict | None:
        """Return the verdict, or None when there is none after `timeout_s`."""
        with self._recorder.changed:
            self._recorder.changed.wait_for(lambda: self.verdict is not None, timeout_s)
            return self.verdict

    def wait_written(self, timeout_s: float) -> bool:
        """Wait until no row of this chunk is under way to SQL; False after `timeout_s`."""
        with self._recorder.changed:
            return self._recorder.changed.wait_for(lambda: self.recorded >= self.arrived or not self.wants_rows, timeout_s)

    @property
    def is_answered(self) -> bool:
        """Whether the engine has nothing left to compute of it."""
        return self.arrived >= self.owed

    @property
    def seconds(self) -> float:
        """How long it has been open."""
        return max(time.monotonic() - self._opened, 1e-3)

    @property
    def wants_rows(self) -> bool:
        """Whether its rows can still be written: not when the chunk belongs to somebody else."""
        return self.verdict not in (Verdict.FENCED, Verdict.CANCELLED, Verdict.BROKEN)


class Recorder:
    """Start with `start`; each claimed chunk then takes a ledger with `open`."""

    def __init__(self, store: Store, *, flush_rows: int, flush_interval_s: float, spool: Spool, outage: Outage) -> None:
        """Begin a transaction when `flush_rows` completions wait, the oldest has waited `flush_interval_s`, or a chunk is complete."""
        self.changed = threading.Condition()
        self._store = store
        self._outage = outage
        self._flush_rows = flush_rows
        self._flush_interval_s = flush_interval_s
        self._numbers = itertools.count(1)
        self._rows: deque[Row] = deque()
        # Taken from `_rows` for the transaction that is under way.
        self._in_hand: list[Row] = []
        self._spool = spool
        # Guards the two below and the order of what is done to the spool; taken before `changed`, never after it.
        self._saving = threading.Lock()
        # Rows up to these numbers are on disk, and settled: written, or wanted by nobody any more.
        self._saved = 0
        self._settled = 0
        # Whether rows wait that complete a chunk: nothing is gained by keeping its task, and the batch's end, waiting.
        self._is_urgent = False
        self._ledgers: set[Ledger] = set()
        self._closing = False
        self._give_up = False
        self.rows_written = 0
        self._thread = threading.Thread(target=self._run, name="headrace-recorder", daemon=True)

    def start(self) -> None:
        """Start the flushing thread."""
        self._thread.start()

    @contextmanager
    def open(self, claim: Claim, *, owed: int) -> Iterator[Ledger]:
        """Give the ledger of one claimed chunk, which is known to the lease keeper while the block runs."""
        ledger = Ledger(self, claim, owed=owed)
        with self.changed:
            self._ledgers.add(ledger)
        try:
            yield ledger
        finally:
            with self.changed:
                self._ledgers.discard(ledger)

    def ledgers(self) -> list[Ledger]:
        """Return the ledgers of the chunks that are being worked on."""
        with self.changed:
            return list(self._ledgers)

    @property
    def rows_waiting(self) -> int:
        """Completions that are not in SQL yet."""
        return len(self._rows) + len(self._in_hand)

    def write_now(self, *, timeout_s: float) -> bool:
        """Write the rows that wait now, not when they are due; False where some still wait after `timeout_s`."""
        with self.changed:
            if not (waiting := self._rows or self._in_hand):
                return True
            last = waiting[-1].number
            self._is_urgent = True
            self.changed.notify_all()
            return self.changed.wait_for(lambda: self._settled >= last, timeout_s)

    def save_waiting(self, *, age_s: float) -> None:
        """When a row has waited for `age_s` seconds, put all that wait and are not there yet on disk. Raise `SpoolFull`."""
        with self._saving:
            with self.changed:
                waiting = itertools.chain(self._in_hand, self._rows)
                rows = [row for row in waiting if row.number > self._saved and row.ledger.wants_rows]
            if not rows or time.monotonic() - rows[0].arrived < age_s:
                return
            self._spool.append((ledger.claim, completions) for ledger, completions in _by_ledger(rows).items())
            self._saved = rows[-1].number
            self._clear_spool()

    def _clear_spool(self) -> None:
        """Give the spool up if all that is in it is settled. The caller holds `_saving`."""
        if self._spool.size and self._settled >= self._saved:
            self._spool.clear()

    def take(self, ledger: Ledger, completion: Completion) -> None:
        """Queue one row. Called by `Ledger.add`."""
        with self.changed:
            if not ledger.wants_rows:
                return
            ledger.arrived += 1
            self._rows.append(Row(next(self._numbers), ledger, completion, time.monotonic()))
            is_complete = ledger.arrived == ledger.owed
            self._is_urgent = self._is_urgent or is_complete
            # The flusher sleeps until the oldest row is due: of other rows it need not hear.
            if is_complete or len(self._rows) in (1, self._flush_rows):
                self.changed.notify_all()

    def close(self, *, timeout_s: float) -> None:
        """Write what waits, for `timeout_s` at most, and end the thread. What could not be written stays in the spool."""
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._leave_to_the_next()
            self._give_up = True
        self._spool.close()

    def _leave_to_the_next(self) -> None:
        count = self.rows_waiting
        try:
            self.save_waiting(age_s=0)
        except SpoolFull as error:
            log.error(  # noqa: TRY400  # a full disk is no bug: no traceback
                "the store is still away and the spool takes no more (%s): of %d completions some are dropped and will be computed again",
                error, count, extra={"event": "rows_dropped", "rows": count},
            )  # fmt: skip
        else:
            log.warning(
                "the store is still away: %d completions wait in %s for the next worker on this host", count, self._spool.path,
                extra={"event": "rows_left_in_spool", "rows": count, "path": str(self._spool.path)},
            )  # fmt: skip

    def _run(self) -> None:
        while rows := self._next_rows():
            try:
                self._write(rows)
            except HEALS:
                return  # closed before the store was back
            with self._saving:
                self._in_hand = []
                self._settled = rows[-1].number
                self._clear_spool()
            with self.changed:
                self.changed.notify_all()

    def _next_rows(self) -> list[Row]:
        """Wait for the next transaction's rows. Empty: closed, and nothing is left."""
        with self.changed:
            while True:
                if len(self._rows) >= self._flush_rows or (self._rows and (self._closing or self._is_urgent)):
                    break
                if self._closing:
                    return []
                due = self._rows[0].arrived + self._flush_interval_s - time.monotonic() if self._rows else None
                if due is not None and due <= 0:
                    break
                self.changed.wait(due)
            if len(self._rows) <= self._flush_rows:
                self._is_urgent = False
            self._in_hand = [self._rows.popleft() for _ in range(min(self._flush_rows, len(self._rows)))]
            return self._in_hand

    def _write(self, rows: Sequence[Row]) -> None:
        """Write one transaction; when it is refused, each chunk by itself, so that one chunk's trouble stays its own."""
        by_ledger = _by_ledger(row for row in rows if row.ledger.wants_rows)
        self._record_late(_by_ledger(row for row in rows if row.ledger.verdict is Verdict.FENCED))
        try:
            if by_ledger:
                self._record(by_ledger)
        except HEALS:
            raise
        except Exception as error:
            if len(by_ledger) == 1:
                self._break(next(iter(by_ledger)), error)
                return
            for ledger, completions in by_ledger.items():
                try:
                    self._record({ledger: completions})
                except HEALS:
                    raise
                except Exception as own_error:
                    self._break(ledger, own_error)

    def _record(self, by_ledger: dict[Ledger, list[Completion]]) -> None:
        items = [(ledger.claim, completions) for ledger, completions in by_ledger.items()]
        count = sum(len(completions) for _, completions in items)
        results = self._outage.ride_out(
            lambda: self._store.record_many(items), what=f"a transaction of {count} completions", give_up=lambda: self._give_up
        )
        fenced = {result.claim for result in results if result.status is RecordStatus.FENCED}
        self._record_late({ledger: rows for ledger, rows in by_ledger.items() if ledger.claim in fenced})
        with self.changed:
            for (ledger, completions), result in zip(by_ledger.items(), results, strict=True):
                self._book(ledger, completions, result)
            self.changed.notify_all()

    def _record_late(self, by_ledger: dict[Ledger, list[Completion]]) -> None:
        """Answers that outlived an outage on disk count, though their chunk was taken meanwhile, as they would after a kill."""
        if not by_ledger or self._in_hand[0].number > self._saved:
            return
        items = [(ledger.claim, completions) for ledger, completions in by_ledger.items()]
        try:
            late = self._outage.ride_out(
                lambda: self._store.record_late(items), what="answers of an outage", give_up=lambda: self._give_up
            )
        except HEALS:
            raise
        except Exception:
            log.exception(
                "answers that waited on disk could not be recorded; others compute them", extra={"event": "record_failed"}
            )
        else:
            self.rows_written += sum(result.inserted for result in late)

    def _book(self, ledger: Ledger, completions: Sequence[Completion], result: RecordResult) -> None:
        if result.status is not RecordStatus.OK:
            # Also where the work had ended otherwise: nobody is to wait for rows that are not wanted.
            ledger.verdict = Verdict(result.status)
            return
        self.rows_written += result.inserted
        ledger.recorded += len(completions)
        ledger.failed += sum(completion.error is not None for completion in completions)
        ledger.tokens += sum(completion.usage.completion_tokens for completion in completions)
        if ledger.verdict is None and ledger.recorded >= ledger.owed:
            ledger.verdict = Verdict.RECORDED

    def _break(self, ledger: Ledger, error: Exception) -> None:
        log.error(
            "chunk %s could not be recorded; its lease runs out and it is computed again", ledger.claim.chunk_id,
            exc_info=error, extra={"event": "record_failed", "chunk_id": ledger.claim.chunk_id},
        )  # fmt: skip
        with self.changed:
            ledger.error = error
            ledger.verdict = Verdict.BROKEN
            self.changed.notify_all()


def _by_ledger(rows: Iterable[Row]) -> dict[Ledger, list[Completion]]:
    found: dict[Ledger, list[Completion]] = {}
    for row in rows:
        found.setdefault(row.ledger, []).append(row.completion)
    return found
