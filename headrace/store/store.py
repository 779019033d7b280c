"""The store: one method for each thing that a room may ask of SQL, each in its own short transaction.

Thread-safe; one for each process. Every method may raise `StoreUnavailable`, every one that writes `StorageFull`.
Nothing here knows Celery, HTTP or the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from sqlalchemy import text

from headrace.batch import Batch, BatchStatus, Item, OutputKind, OutputRow
from headrace.completion import Completion, CompletionError, TokenUsage
from headrace.config import GenerationConfig, Prompt
from headrace.errors import Conflict, NotFound
from headrace.store import again, batches, chunks, creation, lifecycle, outputs, results, schema, turns, workers
from headrace.store.admission import check_room
from headrace.store.files import Files
from headrace.store.ingest import Ingests
from headrace.store.keys import Keys
from headrace.store.pulse import Pulses
from headrace.store.session import Database
from headrace.store.values import ChunkMessage, ChunkRef, Claim, PendingPrompt, RecordResult, WorkerInfo

log = logging.getLogger(__name__)


def _never() -> bool:
    return False


class Store:
    """Batches, chunks and completions in SQLite or PostgreSQL."""

    def __init__(self, url: str, *, create: bool = False, pool_size: int = 20) -> None:
        """Open `sqlite:///PATH` or `postgresql+psycopg://…`; `create` brings the schema up to date; `pool_size`: connections kept."""
        self._database = Database(url, pool_size=pool_size)
        self.keys = Keys(self._database)
        self.files = Files(self._database)
        self.ingests = Ingests(self._database)
        self.pulses = Pulses(self._database)
        if create:
            self.migrate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._database.close()

    def migrate(self) -> None:
        """Bring the schema to this release's; several processes may call it at once."""
        schema.migrate(self._database)

    def check_schema(self) -> None:
        """Raise `StoreUnavailable` unless the schema is this release's."""
        schema.check(self._database)

    @property
    def mark(self) -> str:
        """What tells this store and its schema from others: a digest of the URL without its password, and the schema's version."""
        digest = hashlib.sha256(self._database.url.set(password=None).render_as_string().encode()).hexdigest()
        return f"{digest[:16]} {schema.newest()}"

    def check_room(self, *, max_bytes: float, min_free_bytes: float) -> None:
        """Raise `StorageFull` when the database is larger than `max_bytes`, or (SQLite) has too little room on its disk."""
        check_room(self._database, max_bytes=max_bytes, min_free_bytes=min_free_bytes)

    def ping(self) -> None:
        """Raise `StoreUnavailable` unless the database answers."""
        self._database.read(lambda connection: connection.execute(text("SELECT 1")))

    # Batches

    def create_batch(  # noqa: PLR0913  # one keyword for each thing that a caller may say
        self,
        prompts: Iterable[Prompt | CompletionError | Item],
        gen_config: GenerationConfig,
        *,
        model: str,
        chunk_size: int = 64,
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        completion_window: str = "24h",
        endpoint: str = "/v1/batches",
        idempotency_key: str | None = None,
        max_open_prompts: int | None = None,
        owner: str | None = None,
        reserved: int = 0,
    ) -> Batch:
        """Store a batch; `prompts` is read once, in slices, so it may be a generator over more than memory holds.

        An `Item` is a prompt with a config or a name of its own. A `CompletionError` in the place of a prompt is recorded as that
        prompt's failed completion; when all are, the batch is over at once. A second call with the same `idempotency_key` and
        content returns the first one's batch. Raises `InvalidRequest`, `Conflict` while the first one is still being stored, or
        `QueueFull` while `max_open_prompts` of all batches are unanswered or `owner`, an API key's id, is at its limits (`reserved`
        prompts are announced, 0: not known); nothing is stored then.
        """
        order = creation.Order(
            gen_config=gen_config, model=model, chunk_size=chunk_size, metadata=metadata or {}, priority=priority,
            completion_window=completion_window, endpoint=endpoint, idempotency_key=idempotency_key,
            max_open_prompts=max_open_prompts, owner=owner, reserved=reserved,
        )  # fmt: skip
        batch_id = creation.create(self._database, prompts, order)
        batch = self.get_batch(batch_id)
        if batch.status is BatchStatus.CANCELLING:
            self._close(batch_id)
            batch = self.get_batch(batch_id)
        return batch

    def get_batch(self, batch_id: str) -> Batch:
        """Return one batch: a single row's read, whatever its size. Raises `NotFound`."""
        return self._database.read(lambda connection: batches.from_row(batches.get(connection, batch_id)))

    def token_stats(self, batch_id: str) -> TokenUsage:
        """Return the tokens of a batch so far: a single row's read. Raises `NotFound`."""
        return self._database.read(lambda connection: batches.usage_of(batches.get(connection, batch_id)))

    def owner_of(self, batch_id: str) -> str | None:
        """Return the id of the API key that sent the batch; None: no key of the table did. Raises `NotFound`."""
        return self._database.read(lambda connection: batches.owner_of(connection, batch_id))

    def list_batches(
        self, *, after: str | None = None, limit: int = 20, status: BatchStatus | None = None, owner: str | None = None
    ) -> list[Batch]:
        """Return batches (of `owner` alone), newest first, from the one after `after`. Raises `NotFound` when that is unknown."""
        return self._database.read(
            lambda connection: batches.find(connection, after=after, limit=limit, status=status, owner=owner)
        )

    def cancel_batch(
        self, batch_id: str, *, when_stopped: Callable[[], object] = lambda: None, within_s: float = math.inf
    ) -> Batch:
        """Stop a batch: nobody begins on its prompts any more; then `when_stopped` is called, to tell those who work on some.

        Prompts that nobody works on get the error 'batch_cancelled' now, those of a chunk that a worker holds when the worker
        reports next (or its lease runs out). What isn't done after `within_s` seconds is left to `close_and_erase`: the batch is
        `cancelling` till then. Raises `NotFound`, and `Conflict` when the batch is over.
        """
        until = time.monotonic() + within_s
        self._database.write(lambda connection: batches.begin_cancel(connection, batch_id), repeatable=False)
        when_stopped()
        self._close(batch_id, lambda: time.monotonic() > until)
        return self.get_batch(batch_id)

    def retry_batch(self, batch_id: str, **options: Any) -> Batch:
        """Make a new batch of the failed prompts of one that is over, in their order, with its `gen_config`, model and priority.

        `options` are those of `create_batch`. Prompts that were refused as they came in are left out: they would be refused again.
        Raises `NotFound`, and `Conflict` when the batch is not over or has nothing to retry.
        """
        old = self.get_batch(batch_id)
        if not old.status.is_terminal:
            raise Conflict(f"Cannot retry a batch with status '{old.status}'; wait for its end or cancel it.")
        failed = again.failed_prompts(self._database, batch_id)
        first = next(failed, None)
        if first is None:
            raise Conflict("The batch has no failed prompt that could be computed again.")
        options = {"owner": self.owner_of(batch_id), "reserved": old.counts.failed, **options}
        return self.create_batch(
            itertools.chain([first], failed), old.gen_config, model=old.model, priority=old.priority, endpoint=old.endpoint,
            completion_window=old.completion_window, metadata=again.metadata_of(old), **options,
        )  # fmt: skip

    def delete_batch(self, batch_id: str, *, within_s: float = math.inf) -> None:
        """Delete a batch that is over, with its prompts and results. Raises `NotFound`, and `Conflict` while it is not over.

        It is gone at once; its rows go in short transactions, and what is left of them after `within_s` seconds, or by a process
        that was killed, goes with the next sweep.
        """
        until = time.monotonic() + within_s
        self._database.write(lambda connection: batches.begin_delete(connection, batch_id), repeatable=False)
        self._erase(batch_id, lambda: time.monotonic() > until)

    def _erase(self, batch_id: str, stop: Callable[[], bool]) -> None:
        start = 0
        while self._database.write(partial(batches.delete_slice, batch_id=batch_id, start=start)) and not stop():
            start += batches.DELETE_SLICE

    def delete_outlived(self, *, retention_s: float, limit: int = 20) -> int:
        """Delete up to `limit` batches that have been over for `retention_s` seconds; return how many."""
        ids = self._database.read(lambda connection: batches.find_outlived(connection, retention_s=retention_s, limit=limit))
        for batch_id in ids:
            with contextlib.suppress(NotFound):  # another process sweeps too
                self.delete_batch(batch_id)
        return len(ids)

    def count_open_prompts(self) -> int:
        """Return how many prompts of all batches have neither answer nor error."""
        return self._database.read(batches.count_open_prompts)

    def expire_batches(self, *, stop: Callable[[], bool] = _never) -> int:
        """Sweep; return how many batches were touched. Several processes may sweep at once. `stop`: see `close_and_erase`.

        Batches whose window is over end (their open prompts get 'batch_expired'), cancellations whose workers are gone are
        finished, batches whose sender went away before all was stored are given up, deletions that broke off are ended.
        """
        for batch_id in self._database.read(batches.find_due):
            # One at a time, and waiting for it: a batch that is always being written to is never free at first sight.
            self._database.write(partial(batches.begin_expire, batch_id=batch_id))
        given_up = self._database.write(batches.give_up_stalled)
        self._database.write(turns.forget_idle)
        return given_up + self.close_and_erase(stop=stop)

    def close_and_erase(self, *, stop: Callable[[], bool] = _never) -> int:
        """Go on with cancellations, expiries and deletions where they were left; return how many batches are being stopped.

        The open prompts of batches that stop get their errors, those in chunks that a live worker holds excepted. `stop` is asked
        after each piece.
        """
        for batch_id in self._database.read(batches.find_deleting):
            self._erase(batch_id, stop)
        stopping = self._database.read(batches.find_stopping)
        for batch_id in stopping:
            self._close(batch_id, stop)
        return len(stopping)

    def _close(self, batch_id: str, stop: Callable[[], bool] = _never) -> None:
        while self._database.write(lambda connection: lifecycle.close_slice(connection, batch_id)) and not stop():
            pass

    # Chunks

    def next_chunks(self, *, model: str, limit: int, grace_s: float) -> list[ChunkRef]:
        """Return up to `limit` chunks to send now and mark them as sent: by priority, within a priority by turns.

        A chunk that was sent more than `grace_s` seconds ago and not claimed, and one whose lease ran out, is sent again.
        """
        if limit <= 0:
            return []
        # In a transaction of its own: it holds chunks, and the next one waits for batches.
        if self._database.read(lambda connection: chunks.has_lapsed(connection, model=model)):
            self._database.write(lambda connection: chunks.requeue_lapsed(connection, model=model))
        return self._database.write(lambda connection: chunks.next_refs(connection, model=model, limit=limit, grace_s=grace_s))

    def unsend(self, refs: Sequence[ChunkRef]) -> None:
        """Take back the mark of `next_chunks`, for chunks that Redis didn't take."""
        self._database.write(lambda connection: chunks.unsend(connection, [ref.chunk_id for ref in refs]))

    def requeue_lost(self, *, grace_s: float, model: str | None = None) -> int:
        """Put lost chunks back to those that were never sent; return how many.

        Lost: sent but not claimed for `grace_s` seconds, or with a lease that ran out.
        """

        def work(connection: Any) -> int:
            return chunks.requeue_lapsed(connection, model=model) + chunks.requeue_unclaimed(
                connection, grace_s=grace_s, model=model
            )

        return self._database.write(work)

    def count_in_flight(self, *, model: str, grace_s: float | None = None) -> int:
        """Return how many chunks are sent or held.

        With `grace_s`, chunks that `next_chunks` would send again don't count, so that a flushed Redis doesn't leave the window
        full of chunks that are nowhere.
        """
        return self._database.read(lambda connection: chunks.count_in_flight(connection, model=model, grace_s=grace_s))

    def find_chunk(self, chunk_id: str) -> ChunkRef | None:
        """Return the chunk of this id; None: there is none."""
        return self._database.read(lambda connection: chunks.find(connection, chunk_id))

    def chunk_message(self, ref: ChunkRef) -> ChunkMessage:
        """Return the payload of a chunk. Raises `NotFound` when its batch is gone."""
        return self._database.read(lambda connection: chunks.message(connection, ref))

    def claim_chunk(self, chunk_id: str, *, worker: str, lease_s: float) -> Claim | None:
        """Claim a chunk for `lease_s` seconds; None when it is done, cancelled, unknown, or held by a live lease."""
        return self._database.write(
            lambda connection: chunks.claim(connection, chunk_id, worker=worker, lease_s=lease_s), repeatable=False
        )

    def pending(self, claim: Claim) -> list[PendingPrompt]:
        """Return the chunk's prompts that have no completion yet, by index: what is left to do."""
        return self._database.read(lambda connection: chunks.pending(connection, claim))

    def record(self, claim: Claim, completions: Sequence[Completion]) -> RecordResult:
        """Write completions of one claim; see `record_many`."""
        return self.record_many([(claim, completions)])[0]

    def record_many(self, entries: Sequence[tuple[Claim, Sequence[Completion]]]) -> list[RecordResult]:
        """Write completions of several claims in one transaction, count what was not there before, and extend the leases.

        A row that exists is left as it is, so anything may be recorded again. Results come in the order of `entries`; a fenced
        or cancelled claim takes nothing from the others.
        """
        return self._database.write(lambda connection: results.record(connection, entries)) if entries else []

    def record_late(self, entries: Sequence[tuple[Claim, Sequence[Completion]]]) -> list[RecordResult]:
        """Write completions whose claims may be void by now: answers that waited on a worker's disk.

        Rows that are there stay as they are, those that are missing count. No lease and no chunk's state is touched, so whoever
        holds the chunk now goes on. `status` is CANCELLED where the chunk is closed or gone: then nothing is missing.
        """
        return self._database.write(lambda connection: results.record_late(connection, entries)) if entries else []

    def finish_chunk(self, claim: Claim) -> bool:
        """Mark a chunk done if all its rows are there and the claim holds; the last one ends the batch. May be called again."""
        return self._database.write(lambda connection: chunks.finish(connection, claim))

    def release_chunk(self, claim: Claim) -> None:
        """Hand a chunk back: what is recorded stays, the attempt isn't counted. No-op when the claim no longer holds."""
        self._database.write(lambda connection: chunks.release(connection, claim))

    def renew(self, claims: Sequence[Claim], lease_s: float) -> set[Claim]:
        """Extend leases; return the claims that still hold. Work on the others is to stop."""
        return self._database.write(lambda connection: chunks.renew(connection, claims, lease_s)) if claims else set()

    # Results

    def results(self, batch_id: str, *, after: int = -1, limit: int = 1000) -> list[Completion]:
        """Return up to `limit` completions with an index above `after`, by index. Raises `NotFound`."""

        def work(connection: Any) -> list[Completion]:
            found = results.page(connection, batch_id, after=after, limit=limit)
            # Afterwards, always: a page of a batch that is being deleted has gaps.
            batches.get(connection, batch_id)
            return found

        return self._database.read(work)

    def stream_results(self, batch_id: str, *, after: int = -1, page: int = 500) -> Iterator[Completion]:
        """Yield every completion that is there, by index, with one page in memory. Raises `NotFound` at the first item.

        No transaction is open between pages: a reader that stays for hours would keep SQLite's log growing.
        """
        while found := self.results(batch_id, after=after, limit=page):
            yield from found
            after = found[-1].index

    def announce_outputs(self, batch_id: str) -> None:
        """List the files of a batch that is over, where the release that ended it did not."""

        def work(connection: Any) -> None:
            row = lifecycle.lock_batch(connection, batch_id)
            if row is not None and BatchStatus(row.status).is_terminal:
                outputs.announce(connection, row)

        self._database.write(work)

    def output_rows(self, batch_id: str, kind: OutputKind, *, after: int = -1, limit: int = 500) -> list[OutputRow]:
        """Return up to `limit` answers ('output') or errors ('errors') with an index above `after`, by index, with their custom_ids.

        Raises `NotFound`.
        """

        def work(connection: Any) -> list[OutputRow]:
            found = outputs.page(connection, batch_id, kind, after=after, limit=limit)
            # Afterwards, as in `results`: of a batch that is being deleted rows are missing, and the names of others.
            batches.get(connection, batch_id)
            return found

        return self._database.read(work)

    # Workers

    def register_worker(self, worker_id: str, *, host: str, model: str, stats: Mapping[str, Any] | None = None) -> None:
        """Write a worker down, with this moment as its start."""
        self._database.write(
            lambda connection: workers.register(connection, worker_id, host=host, model=model, stats=stats or {})
        )

    def heartbeat(self, worker_id: str, stats: Mapping[str, Any] | None = None) -> bool:
        """Note that a worker lives, and its `stats` if given; return False when it isn't registered."""
        return self._database.write(lambda connection: workers.heartbeat(connection, worker_id, stats))

    def remove_worker(self, worker_id: str) -> None:
        """Strike a worker off; no-op when it is unknown."""
        self._database.write(lambda connection: workers.forget(connection, worker_id))

    def list_workers(self, *, max_age_s: float | None = None, model: str | None = None) -> list[WorkerInfo]:
        """Return the workers, those heard of within `max_age_s` seconds if given, in order of their start."""
        return self._database.read(lambda connection: workers.read(connection, max_age_s=max_age_s, model=model))


def open_store(url: str, *, create: bool = False) -> Store:
    """Return a store whose schema was found to be this release's (or brought there, with `create`)."""
    store = Store(url, create=create)
    try:
        store.check_schema()
    except BaseException:
        store.close()
        raise
    return store
