"""What a worker does beside its chunks: messages of another release, and batches that have outlived their time."""

from __future__ import annotations

from collections.abc import Callable

from echo_frontend import EchoFrontend

from headrace.config import GenerationConfig
from headrace.store import Store
from worker.runtime import Runtime
from worker.tasks import generate_chunk

CONFIG = GenerationConfig()


def test_old_batches_are_deleted_where_the_operator_says_so(
    make_runtime: Callable[..., Runtime], engine: EchoFrontend, store: Store
) -> None:
    batch = store.create_batch(["a"], CONFIG, model="echo")
    keeping = make_runtime(engine)
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    generate_chunk(keeping, store.chunk_message(ref), lambda _: None)
    keeping.reconcile()
    assert store.list_batches() == [store.get_batch(batch.id)]
    make_runtime(engine, retention_s=1e-6).reconcile()
    assert store.list_batches() == []
