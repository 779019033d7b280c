"""Everything that one worker process holds while it works: store, broker, engine, recorder, and the chores that keep them true.

    chore          every                   does
    lease keeper   1 s, or a lease / 4     renews the SQL leases of the chunks in flight, and finds out which were lost or cancelled
    heartbeat      5 s                     tells the store that this worker lives, with its figures
    reconciler     reconcile_interval_s    expires and deletes batches and files, and sends what SQL has and Redis lost
    reader         reconcile_interval_s    reads on the files of batches whose reader in the API is gone
    spool          1 s                     puts answers on disk that SQL has not taken for a while

This module knows no Celery; `worker.lifecycle` starts and ends it, `worker.tasks` works with it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from headrace.broker import Broker, dispatch
from headrace.errors import HeadraceError, QueueUnavailable
from headrace.ingest import read_next
from headrace.upkeep import sweep
from worker.host import EngineHost
from worker.listener import Listener
from worker.outage import HEALS, Outage
from worker.recorder import Recorder, Verdict
from worker.spool import Spool, SpoolFull

if TYPE_CHECKING:
    from headrace.settings import Settings
    from headrace.store import ChunkMessage, Store

log = logging.getLogger(__name__)

HEARTBEAT_S: Final = 5.0
SPOOL_EVERY_S: Final = 1.0
WRITE_PATIENCE_S: Final = 1.0
"""How long the lease keeper waits for the database to take the rows that are there, a lease's eighth at most."""
CLOSE_PATIENCE_S: Final = 10.0
"""How long a closing worker waits for the database to take its last rows."""


class Chore:
    """Calls something at an interval from a thread of its own. An error is logged and the next call comes all the same."""

    def __init__(self, name: str, call: Callable[[], None], *, every_s: float) -> None:
        """Prepare; after `start`, the first call comes `every_s` seconds later."""
        self._name = name
        self._call = call
        self._every_s = every_s
        # Set to call at once, and by `stop`.
        self._due = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"headrace-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Let the next call come now; returns at once."""
        self._due.set()

    def stop(self) -> None:
        """End the thread and wait for a call that is under way."""
        self._stopped = True
        self._due.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_PATIENCE_S)

    def _run(self) -> None:
        while True:
            self._due.wait(self._every_s)
            self._due.clear()
            if self._stopped:
                return
            try:
                self._call()
            except (*HEALS, QueueUnavailable) as error:
                log.warning("%s: %s It is done again in %.0f s.", self._name, error.message, self._every_s,
                            extra={"event": "chore_postponed", "chore": self._name, "code": error.code})  # fmt: skip
            except Exception:
                log.exception("%s failed; it is done again in %.0f s", self._name, self._every_s,
                              extra={"event": "chore_failed", "chore": self._name})  # fmt: skip


class Runtime:
    """One for each worker process. `start`, then any number of chunks at once, then `drain` and `close`."""

    def __init__(self, settings: Settings, *, store: Store, broker: Broker, host: EngineHost, name: str | None = None) -> None:
        """`name` tells workers apart for operators, such as Celery's node name. Nothing runs before `start`."""
        self.settings = settings
        self.store = store
        self.broker = broker
        self.host = host
        self.worker_id = f"{name or f'worker@{socket.gethostname()}'}#{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.outage = Outage()
        self._spool = Spool(settings.spool_dir, store=store.mark, worker=self.worker_id, max_bytes=settings.spool_bytes)
        self.recorder = Recorder(
            store,
            flush_rows=settings.flush_rows,
            flush_interval_s=settings.flush_interval_s,
            spool=self._spool,
            outage=self.outage,
        )
        self.draining = threading.Event()
        """Set: no chunk is taken any more."""
        self.on_trouble: Callable[[str], None] = lambda _: None
        """Called when the engine is lost, so that the process ends. Set by the lifecycle."""
        self.has_lost_engine = False
        """Set: leases are renewed no more."""
        self._has_told_spool_full = False
        self._chunks = 0
        # Those of them whose prompts the engine's host counts; the sequences of the last one, which is what others are taken to have.
        self._known = 0
        self._chunk_width = settings.chunk_size
        self._chunks_changed = threading.Condition()
        self._chunks_done = 0
        self._refilling = threading.Lock()
        self._keeper = Chore("lease-keeper", self.keep_leases, every_s=min(settings.lease_s / 4, 1.0))
        self._listener = Listener(settings.redis_url, self.look_now)
        self._chores = (
            self._keeper,
            Chore("heartbeat", self.beat, every_s=HEARTBEAT_S),
            Chore("reconciler", self.reconcile, every_s=settings.reconcile_interval_s),
            Chore("reader", self.read_files, every_s=settings.reconcile_interval_s),
            Chore("spool", self.save_waiting, every_s=SPOOL_EVERY_S),
        )

    def start(self) -> None:
        """Register this worker and start the threads."""
        self._register()
        self.recorder.start()
        for chore in self._chores:
            chore.start()
        self._listener.start()

    @contextmanager
    def working(self) -> Iterator[Callable[[ChunkMessage], None]]:
        """Count one chunk as being worked on. What this yields is called with its message just before the engine's host counts its prompts."""
        known = 0

        def tell(message: ChunkMessage) -> None:
            nonlocal known
            known = 1
            # Of the whole chunk, not of what is left of it: after a crash that may be nothing, and nothing would be taken to come.
            width = sum(message.config_of(index).n for index in range(message.start, message.stop))
            with self._chunks_changed:
                self._known += 1
                self._chunk_width = width

        with self._chunks_changed:
            self._chunks += 1
        try:
            yield tell
        finally:
            with self._chunks_changed:
                self._chunks -= 1
                self._known -= known
                self._chunks_done += 1
                self._chunks_changed.notify_all()

    def keep_leases(self) -> None:
        """Renew the leases of the chunks in flight, unless the engine stands still: then another worker shall have them."""
        self.check_engine()
        if self.has_lost_engine:
            return
        if not self.outage.is_on:
            # A renewal closes the chunk of a cancelled batch: what is answered of it comes first.
            self.recorder.write_now(timeout_s=min(self.settings.lease_s / 8, WRITE_PATIENCE_S))
        open_ledgers = {ledger.claim: ledger for ledger in self.recorder.ledgers() if ledger.verdict is None}
        held = self.store.renew(list(open_ledgers), self.settings.lease_s) if open_ledgers else set()
        for claim, ledger in open_ledgers.items():
            if claim not in held:
                ledger.settle(Verdict.FENCED)

    def takes_chunk(self, *, held: int) -> bool:
        """Whether another chunk makes sense now, where `held` are in flight or on their way here.

        Not while the store is away, nor while it is behind with the rows of the last, nor where its prompts would only wait.
        """
        if self.draining.is_set() or self.outage.is_on or self._spool.size:
            return False
        return self.host.has_room(coming=max(0, held - self._known) * self._chunk_width)

    def save_waiting(self) -> None:
        """Put answers on disk that SQL has not taken for a while. Where there is no room, nothing more is computed."""
        try:
            self.recorder.save_waiting(age_s=self.settings.flush_interval_s + SPOOL_EVERY_S)
        except SpoolFull as error:
            at_work = [ledger for ledger in self.recorder.ledgers() if ledger.verdict is None and not ledger.is_answered]
            if at_work or not self._has_told_spool_full:
                log.error(  # noqa: TRY400  # a full disk is no bug: no traceback
                    "the store is away and the spool takes no more (%s): %d answers wait in memory only, %d chunks stop here, and the "
                    "rest of them is computed when the store is back", error, self.recorder.rows_waiting, len(at_work),
                    extra={"event": "spool_full", "chunks": len(at_work), "rows": self.recorder.rows_waiting},
                )  # fmt: skip
            self._has_told_spool_full = True
            for ledger in at_work:
                ledger.settle(Verdict.OUT_OF_ROOM)
        else:
            self._has_told_spool_full = False

    def look_now(self) -> None:
        """Find out now, not at the next renewal, which chunks were cancelled; returns at once."""
        self._keeper.wake()

    def check_engine(self) -> None:
        """Look after the engine. One that answers no more ends the work: chunks are handed back, the process is asked to end."""
        trouble = self.host.trouble()
        if trouble is not None and not self.has_lost_engine:
            self._give_up(trouble)

    def _give_up(self, trouble: str) -> None:
        self.has_lost_engine = True
        self.draining.set()
        log.critical(
            "%s; this worker hands its chunks back and ends, so that whoever supervises it starts it anew", trouble,
            extra={"event": "engine_lost", "chunks": self._chunks},
        )  # fmt: skip
        for ledger in self.recorder.ledgers():
            ledger.settle(Verdict.ENGINE_LOST)
        self.on_trouble(trouble)

    def stats(self) -> dict[str, Any]:
        """Return this worker's figures, for its row in the store."""
        return {
            "pid": os.getpid(),
            "chunks_in_flight": self._chunks,
            "chunks_done": self._chunks_done,
            "rows_recorded": self.recorder.rows_written,
            "rows_waiting": self.recorder.rows_waiting,
            "spool_bytes": self._spool.size,
            "prompts_in_engine": self.host.prompts_inside,
            "engine": self.host.stats(),
        }

    def beat(self) -> None:
        """Tell the store that this worker lives."""
        if not self.store.heartbeat(self.worker_id, self.stats()):
            self._register()

    def _register(self) -> None:
        self.store.register_worker(self.worker_id, host=socket.gethostname(), model=self.settings.model, stats=self.stats())

    def reconcile(self) -> None:
        """Compare SQL with what is in flight, and send what is missing. Two of these at once do no harm."""
        sweep(self.store, self.settings)
        self.refill()

    def read_files(self) -> None:
        """Go on where a reader of the API was killed. While one works on a file, its lease keeps this one from it."""
        while read_next(self.store, self.settings, stop=self.draining.is_set) is not None:
            self.refill()

    def refill(self) -> None:
        """Send the next chunks of this worker's model, unless another thread is at it. Never raises for an outage."""
        if self.draining.is_set() or not self._refilling.acquire(blocking=False):
            return
        try:
            sent = dispatch(self.store, self.broker, self.settings, self.settings.model)
        except (*HEALS, QueueUnavailable) as error:
            log.warning("the next chunks are sent later, by the reconciler: %s", error.message,
                        extra={"event": "chunks_wait", "code": error.code})  # fmt: skip
            return
        finally:
            self._refilling.release()
        if sent:
            log.info("sent %d chunks", sent, extra={"event": "chunks_sent", "chunks": sent, "model": self.settings.model})

    def drain(self, timeout_s: float) -> None:
        """Take no more chunks; let those in flight end for `timeout_s`, then hand the rest of them back."""
        self.draining.set()
        if self._wait_idle(timeout_s):
            return
        ledgers = self.recorder.ledgers()
        log.warning(
            "%d chunks are not done after %.0f s; what is recorded of them stays, the rest is handed back", len(ledgers), timeout_s,
            extra={"event": "chunks_handed_back", "chunks": len(ledgers)},
        )  # fmt: skip
        for ledger in ledgers:
            ledger.settle(Verdict.DRAINED)
        self._wait_idle(CLOSE_PATIENCE_S)

    def _wait_idle(self, timeout_s: float) -> bool:
        with self._chunks_changed:
            return self._chunks_changed.wait_for(lambda: self._chunks == 0, timeout_s)

    def close(self) -> None:
        """Write what waits, end the engine and forget this worker. After `drain`."""
        started = time.monotonic()
        self.draining.set()
        self._listener.stop()
        for chore in self._chores:
            chore.stop()
        self.recorder.close(timeout_s=CLOSE_PATIENCE_S)
        self.host.close()
        try:
            self.store.remove_worker(self.worker_id)
        except HeadraceError as error:
            log.warning("%s could not sign off: %s", self.worker_id, error.message, extra={"event": "worker_lost_touch"})
        self.broker.close()
        log.info(
            "%s has ended", self.worker_id,
            extra={"event": "worker_ended", "chunks": self._chunks_done, "seconds": round(time.monotonic() - started, 1)},
        )  # fmt: skip
