"""One database, one Redis and the workers of a test: what the integration tests submit to, kill, and count at the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from worker_process import HeadraceProcess, wait_for, worker_process

from headrace.broker import Broker, dispatch, make_celery
from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.store import Store


class Service:
    """One database, one Redis, and what a client needs to submit; workers are started by the test."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.store = Store(settings.database_url)
        self.store.migrate()
        self.broker = Broker(make_celery(settings))
        self._workers = 0

    def worker(self, *, concurrency: int = 4, environ: dict[str, str] | None = None, **changes: object) -> HeadraceProcess:
        """Return a worker process, not started."""
        self._workers += 1
        settings = dataclasses.replace(self.settings, **changes)
        name = f"gpu{self._workers}"
        return worker_process(settings, self.folder / f"{name}.log", name=name, concurrency=concurrency, environ=environ)

    def ready(self, worker: HeadraceProcess, *, timeout_s: float = 60) -> HeadraceProcess:
        """Wait until the worker has its model."""
        wait_for(
            lambda: any(f"#{worker.pid}-" in info.id for info in self.store.list_workers()),
            timeout_s=timeout_s,
            what="the worker is registered",
            process=worker,
        )
        return worker

    def submit(self, prompts: list, *, gen_config: GenerationConfig | None = None, send: bool = True, **options: object) -> str:
        """Store a batch and send its first chunks, as the API does."""
        options.setdefault("chunk_size", self.settings.chunk_size)
        batch = self.store.create_batch(prompts, gen_config or GenerationConfig(), model=self.settings.model, **options)
        if send:
            dispatch(self.store, self.broker, self.settings, self.settings.model)
        return batch.id

    def done(self, batch_id: str) -> int:
        return self.store.get_batch(batch_id).counts.done

    def wait_over(self, batch_id: str, worker: HeadraceProcess | None = None, *, timeout_s: float = 60):
        """Return the batch when it is over."""
        return wait_for(
            lambda: (batch := self.store.get_batch(batch_id)).status.is_terminal and batch,
            timeout_s=timeout_s,
            what=f"the batch is over, at {self.store.get_batch(batch_id).counts}",
            process=worker,
        )

    def assert_exactly_once(self, batch_id: str, total: int):
        """Check the oracle: one row for each index, in order, and counters that equal a recount. Return the rows."""
        rows = list(self.store.stream_results(batch_id))
        assert [row.index for row in rows] == list(range(total))
        batch = self.store.get_batch(batch_id)
        assert batch.counts.total == total
        assert batch.counts.failed == sum(row.error is not None for row in rows)
        assert batch.counts.completed == sum(row.error is None for row in rows)
        assert batch.usage.prompt_tokens == sum(row.usage.prompt_tokens for row in rows)
        assert batch.usage.completion_tokens == sum(row.usage.completion_tokens for row in rows)
        assert batch.usage.cached_tokens == sum(row.usage.cached_tokens for row in rows)
        return rows

    def close(self) -> None:
        self.broker.close()
        self.store.close()
