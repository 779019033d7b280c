"""Chunk messages that can't be read: what they point at is read from SQL, and what nobody can read comes to an end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from echo_frontend import EchoFrontend
from sqlalchemy import update
from store_driver import check, execute, lapse

from headrace.batch import BatchStatus
from headrace.broker import POINTER_VERSION, TASK_GENERATE, Broker, dispatch, make_celery
from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.store import ChunkMessage, Store
from headrace.store.tables import batches
from worker.reading import MOST_ATTEMPTS
from worker.runtime import Runtime
from worker.tasks import generate_chunk, register

CONFIG = GenerationConfig()
OLD_MESSAGES = Path(__file__).with_name("messages_of_0_1.json")
"""Chunk messages as the releases before wrote them. Append to it; a message in it stays readable."""


@pytest.fixture
def deliver(settings: Settings, runtime: Runtime) -> Callable[[object], str]:
    """Runs the task as Celery does, with what a message had as its chunk."""
    app = make_celery(settings)
    register(app, lambda _: runtime)
    return app.tasks[TASK_GENERATE].run


@pytest.mark.parametrize(
    "change",
    [{"version": 99}, {"gen_config": {"an_option_of_tomorrow": 1}}, {"new_field": 1}, {"prompts": 7}, {"gen_config": None}],
)
def test_a_message_of_another_release_is_read_from_the_database(
    change: dict, deliver: Callable[[object], str], store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    batch = store.create_batch(["a", "b"], CONFIG, model="echo")
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    assert deliver({**store.chunk_message(ref).to_dict(), **change}).startswith("2/2 rows")
    assert "chunk_unreadable" in [getattr(record, "event", "") for record in caplog.records]
    assert check(store, batch.id).status is BatchStatus.COMPLETED
    assert [row.choices[0].text for row in store.results(batch.id)] == ["echo a", "echo b"]


@pytest.mark.parametrize("chunk", [None, "text", 7, [], {}, {"chunk_id": None}, {"chunk_id": "chunk_of_nobody"}])
def test_what_points_nowhere_is_dropped(chunk: object, deliver: Callable[[object], str]) -> None:
    assert deliver(chunk).startswith("unreadable")


def spoil(store: Store, batch_id: str, **more: int) -> None:
    """Let the batch be stored by a release of tomorrow; with nothing more: by this one."""
    config = json.dumps({**CONFIG.to_dict(), **more})
    execute(store, update(batches).where(batches.c.id == batch_id).values(gen_config=config))


def test_a_stored_batch_that_this_release_cant_read_holds_nobody_up(
    store: Store, broker: Broker, settings: Settings, deliver: Callable[[object], str]
) -> None:
    strange = store.create_batch(["a", "b"], CONFIG, model="echo", chunk_size=1)
    plain = store.create_batch(["c"], CONFIG, model="echo")
    spoil(store, strange.id, an_option_of_tomorrow=1)
    assert dispatch(store, broker, settings, "echo") == 3
    assert broker.count_waiting("echo") == 3
    [ref] = [ref for ref in store.next_chunks(model="echo", limit=9, grace_s=0) if ref.batch_id == plain.id]
    assert deliver(store.chunk_message(ref).to_dict()).startswith("1/1 rows")


def test_a_chunk_that_nobody_can_read_is_given_up_in_the_end(
    store: Store, deliver: Callable[[object], str], caplog: pytest.LogCaptureFixture
) -> None:
    batch = store.create_batch(["a", "b"], CONFIG, model="echo")
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    spoil(store, batch.id, an_option_of_tomorrow=1)
    for _ in range(MOST_ATTEMPTS - 1):
        assert deliver({"version": POINTER_VERSION, "chunk_id": ref.chunk_id}).startswith("unreadable")
        assert store.results(batch.id) == []
        lapse(store, ref.chunk_id)
    deliver({"version": POINTER_VERSION, "chunk_id": ref.chunk_id})
    spoil(store, batch.id)
    over = check(store, batch.id)
    assert (over.status, over.counts.failed) == (BatchStatus.COMPLETED, 2)
    assert {row.error.code for row in store.results(batch.id) if row.error} == {"invalid_request"}
    assert "an_option_of_tomorrow" in str(store.results(batch.id)[0].error)
    assert "chunk_given_up" in [getattr(record, "event", "") for record in caplog.records]


def test_a_worker_of_the_newer_release_takes_it_up_in_between(
    store: Store, deliver: Callable[[object], str], make_runtime: Callable[..., Runtime], engine: EchoFrontend
) -> None:
    batch = store.create_batch(["a", "b"], CONFIG, model="echo")
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    message = store.chunk_message(ref)
    spoil(store, batch.id, an_option_of_tomorrow=1)
    deliver({"version": POINTER_VERSION, "chunk_id": ref.chunk_id})
    assert generate_chunk(make_runtime(engine), message, lambda _: None).endswith("another worker has it"), "held for a lease"
    lapse(store, ref.chunk_id)
    assert generate_chunk(make_runtime(engine), message, lambda _: None).startswith("2/2 rows")


@pytest.mark.parametrize("old", json.loads(OLD_MESSAGES.read_text()), ids=lambda old: old["written_by"])
def test_messages_of_older_releases_stay_readable(old: dict) -> None:
    message = ChunkMessage.from_dict(old["chunk"])
    assert len(message.prompts) == message.stop - message.start
    assert message.gen_config.max_new_tokens == old["max_new_tokens"]
