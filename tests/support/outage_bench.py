"""A recorder with its spool before a real store that is away at will, and the worker that comes after it was killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from echo_frontend import answer
from store_driver import check, lapse
from worker_process import wait_for

from headrace.batch import Batch
from headrace.completion import Completion
from headrace.config import GenerationConfig
from headrace.errors import HeadraceError
from headrace.store import Claim, RecordResult, Store
from worker.outage import Outage
from worker.recorder import Recorder
from worker.salvage import salvage
from worker.spool import Spool


class FailingStore(Store):
    """Refuses rows while `error` is set, before anything is written."""

    error: type[HeadraceError] | None = None

    def record_many(self, entries: Sequence[tuple[Claim, Sequence[Completion]]]) -> list[RecordResult]:
        if self.error is not None:
            raise self.error()
        return super().record_many(entries)


class OutageBench:
    """One chunk of `rows` prompts that a worker has claimed."""

    def __init__(self, url: str, folder: Path, *, rows: int) -> None:
        self.store = FailingStore(url)
        self.store.migrate()
        batch = self.store.create_batch([f"prompt {i}" for i in range(rows)], GenerationConfig(), model="echo", chunk_size=256)
        self.batch_id = batch.id
        [ref] = self.store.next_chunks(model="echo", limit=9, grace_s=60)
        claim = self.store.claim_chunk(ref.chunk_id, worker="gpu@host#1", lease_s=30)
        assert claim is not None
        self.claim = claim
        self.spool = Spool(folder, store=self.store.mark, worker="gpu@host#1", max_bytes=10**7)
        self.recorder = Recorder(self.store, flush_rows=16, flush_interval_s=0.01, spool=self.spool, outage=Outage())
        self.recorder.start()
        self._opened = self.recorder.open(claim, owed=rows)
        self.ledger = self._opened.__enter__()

    def break_store(self, error: type[HeadraceError]) -> None:
        self.store.error = error

    def mend_store(self) -> None:
        self.store.error = None

    def answer(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self.ledger.add(answer(f"prompt {index}", index=index))

    def die(self) -> None:
        """As kill -9: what is on disk stays there without an owner, what is in memory is gone."""
        self.recorder.save_waiting(age_s=0)
        self.recorder._give_up = True
        self.spool.close()
        wait_for(lambda: not self.recorder._thread.is_alive(), timeout_s=5, what="the recorder is dead")

    def salvage(self) -> int:
        return salvage(self.store, self.spool.path.parent, Outage())

    def take_away(self, *, release: bool = False) -> Claim | None:
        """Let the lease run out and another worker claim the chunk; `release`: and hand it back."""
        lapse(self.store, self.claim.chunk_id)
        other = self.store.claim_chunk(self.claim.chunk_id, worker="other", lease_s=30)
        assert other is not None
        if release:
            self.store.release_chunk(other)
        return other

    def finish_by_another(self) -> None:
        other = self.take_away()
        assert other is not None
        self.store.record(other, [answer(f"prompt {i.index}", index=i.index) for i in self.store.pending(other)])
        assert self.store.finish_chunk(other)

    def indexes(self) -> list[int]:
        return [row.index for row in self.store.results(self.batch_id)]

    def check(self) -> Batch:
        return check(self.store, self.batch_id)

    def wait(self, condition: Callable[[], object]) -> None:
        wait_for(condition, timeout_s=5, what="it is so")

    def close(self) -> None:
        self.recorder._give_up = True
        self.recorder.close(timeout_s=5)
        self.store.close()
