"""What a worker does beside its chunks: messages of another release, and batches that have outlived their time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from echo_frontend import EchoFrontend

from headrace.broker import TASK_GENERATE, make_celery
from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.store import Store
from worker.runtime import Runtime
from worker.tasks import generate_chunk, register

CONFIG = GenerationConfig()


@pytest.mark.parametrize("change", [{"version": 99}, {"gen_config": {"an_option_of_tomorrow": 1}}, {"new_field": 1}])
def test_a_message_of_another_release_is_left_to_that_release(
    change: dict, settings: Settings, runtime: Runtime, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    batch = store.create_batch(["a"], CONFIG, model="echo")
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    message = store.chunk_message(ref)
    app = make_celery(settings)
    register(app, lambda _: runtime)
    assert "left to a worker" in app.tasks[TASK_GENERATE].run({**message.to_dict(), **change})
    assert "chunk_unreadable" in [getattr(record, "event", "") for record in caplog.records]
    assert store.get_batch(batch.id).counts.done == 0
    assert store.next_chunks(model="echo", limit=1, grace_s=0) == [ref], "it is sent again after its grace"
    assert generate_chunk(runtime, message, lambda _: None).startswith("1/1 rows")
    app.close()


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
