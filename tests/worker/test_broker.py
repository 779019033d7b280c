"""How chunks enter Redis: a bounded window, copies only of what was lost, nothing marked as sent that was not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from servers import RedisServer

from headrace.broker import KEY_PREFIX, Broker, describe, dispatch, make_celery, queue_name
from headrace.config import GenerationConfig
from headrace.errors import QueueUnavailable
from headrace.settings import Settings
from headrace.store import ChunkMessage, Store


def submit(store: Store, count: int, **options) -> str:
    return store.create_batch([f"p{i}" for i in range(count)], GenerationConfig(), model="echo", chunk_size=1, **options).id


def waiting_messages(settings: Settings) -> list[ChunkMessage]:
    """Read the queue as a worker would, oldest first, without taking anything."""
    client = redis.Redis.from_url(settings.redis_url)
    raw = client.lrange(KEY_PREFIX + queue_name("echo"), 0, -1)
    client.close()
    import base64

    bodies = [json.loads(base64.b64decode(json.loads(item)["body"])) for item in reversed(raw)]
    return [ChunkMessage.from_dict(body[1]["chunk"]) for body in bodies]


@given(st.text(min_size=1), st.text(min_size=1))
def test_two_models_never_share_a_queue(one: str, other: str) -> None:
    assert (queue_name(one) == queue_name(other)) == (one == other)
    assert len(queue_name(one)) < 70
    assert queue_name(one).isascii()


def test_a_plain_name_stays_legible() -> None:
    assert queue_name("smollm2") == "generate.smollm2"
    assert queue_name("/models/Qwen3-8B").startswith("generate.models-qwen3-8b-")


def test_a_message_carries_the_prompts_and_the_config(store: Store, broker: Broker, settings: Settings) -> None:
    config = GenerationConfig(temperature=0.5, top_k=40, stop_words=("END",))
    prompts = ["eins", [{"role": "user", "content": "zwei 水車"}]]
    batch = store.create_batch(prompts, config, model="echo")
    assert dispatch(store, broker, settings, "echo") == 1
    [message] = waiting_messages(settings)
    assert message.batch_id == batch.id
    assert list(message.prompts) == prompts
    assert message.gen_config == config


def test_the_window_is_kept_however_often_it_is_filled(store: Store, broker: Broker, settings: Settings) -> None:
    submit(store, 50)
    assert dispatch(store, broker, settings, "echo") == settings.dispatch_window
    for _ in range(3):
        assert dispatch(store, broker, settings, "echo") == 0
    assert broker.count_waiting("echo") == settings.dispatch_window


def test_chunks_that_are_worked_on_take_room(store: Store, broker: Broker, settings: Settings) -> None:
    submit(store, 50)
    refs = store.next_chunks(model="echo", limit=5, grace_s=60)
    for ref in refs:
        assert store.claim_chunk(ref.chunk_id, worker="w", lease_s=30)
    assert dispatch(store, broker, settings, "echo") == settings.dispatch_window - 5


def test_many_workers_find_chunks_though_they_hold_more_than_the_window(
    store: Store, broker: Broker, settings: Settings
) -> None:
    submit(store, 50)
    for ref in store.next_chunks(model="echo", limit=20, grace_s=60):
        assert store.claim_chunk(ref.chunk_id, worker="w", lease_s=30)
    assert settings.dispatch_window < 20
    assert dispatch(store, broker, settings, "echo") == 5
    assert dispatch(store, broker, settings, "echo") == 0


def test_a_busy_queue_does_not_fill_up_with_copies(store: Store, broker: Broker, settings: Settings) -> None:
    submit(store, 50)
    dispatch(store, broker, settings, "echo")
    time.sleep(settings.requeue_grace_s + 0.1)
    assert dispatch(store, broker, settings, "echo") == 0
    ids = [message.chunk_id for message in waiting_messages(settings)]
    assert len(set(ids)) == len(ids) == settings.dispatch_window


def test_what_redis_lost_is_sent_again_after_its_grace(
    store: Store, broker: Broker, settings: Settings, redis_server: RedisServer
) -> None:
    submit(store, 4)
    assert dispatch(store, broker, settings, "echo") == 4
    redis_server.flush()
    # A grace no slow machine outlasts: with the short one, a pause between the two lines sends the chunks already here.
    assert dispatch(store, broker, dataclasses.replace(settings, requeue_grace_s=600), "echo") == 0
    time.sleep(settings.requeue_grace_s + 0.1)
    assert dispatch(store, broker, settings, "echo") == 4
    assert [message.number for message in waiting_messages(settings)] == [1, 2, 3, 4]


def test_one_lost_message_is_not_answered_with_copies_of_all(store: Store, broker: Broker, settings: Settings) -> None:
    submit(store, 6)
    assert dispatch(store, broker, settings, "echo") == 6
    client = redis.Redis.from_url(settings.redis_url)
    client.rpop(KEY_PREFIX + queue_name("echo"))
    client.close()
    time.sleep(settings.requeue_grace_s + 0.1)
    assert dispatch(store, broker, settings, "echo") == 1
    assert dispatch(store, broker, settings, "echo") == 0


def test_the_chunks_of_a_lost_worker_are_sent_again_and_nothing_else(store: Store, broker: Broker, settings: Settings) -> None:
    submit(store, 6)
    dispatch(store, broker, settings, "echo")
    client = redis.Redis.from_url(settings.redis_url)
    for message in waiting_messages(settings)[:2]:
        assert store.claim_chunk(message.chunk_id, worker="dying", lease_s=5)
        client.rpop(KEY_PREFIX + queue_name("echo"))
    client.close()
    assert dispatch(store, broker, settings, "echo") == 0
    time.sleep(5.1)
    assert dispatch(store, broker, settings, "echo") == 2
    assert sorted(message.number for message in waiting_messages(settings)) == [1, 2, 3, 4, 5, 6]


def test_a_higher_priority_goes_first(store: Store, broker: Broker, settings: Settings) -> None:
    low = submit(store, 6, priority=0)
    high = submit(store, 6, priority=5)
    dispatch(store, broker, settings, "echo")
    assert [message.batch_id for message in waiting_messages(settings)] == [high] * 6 + [low] * 2


def test_while_redis_is_away_nothing_counts_as_sent(
    store: Store, broker: Broker, settings: Settings, redis_server: RedisServer
) -> None:
    submit(store, 4)
    redis_server.kill9()
    started = time.monotonic()
    with pytest.raises(QueueUnavailable):
        dispatch(store, broker, settings, "echo")
    assert time.monotonic() - started < 5
    assert store.count_in_flight(model="echo") == 0
    redis_server.start()
    assert dispatch(store, broker, settings, "echo") == 4


def test_a_redis_that_goes_away_while_chunks_are_sent(store: Store, settings: Settings, redis_server: RedisServer) -> None:
    class Failing(Broker):
        sent = 0

        def enqueue(self, message: ChunkMessage) -> None:
            if self.sent == 3:
                redis_server.kill9()
            super().enqueue(message)
            self.sent += 1

    broker = Failing(make_celery(settings))
    submit(store, 8)
    with pytest.raises(QueueUnavailable):
        dispatch(store, broker, settings, "echo")
    assert store.count_in_flight(model="echo") == 3, "the others are free to be sent at once"
    broker.close()


def test_a_frozen_redis_holds_a_caller_for_seconds_only(settings: Settings, redis_server: RedisServer) -> None:
    broker = Broker(make_celery(settings))
    assert broker.count_waiting("echo") == 0
    redis_server.pause()
    started = time.monotonic()
    with pytest.raises(QueueUnavailable):
        broker.count_waiting("echo")
    assert time.monotonic() - started < 12
    redis_server.resume()
    broker.close()


def test_operators_see_no_prompt(store: Store) -> None:
    store.create_batch(["a secret"], GenerationConfig(), model="echo")
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    line = describe(store.chunk_message(ref))
    assert "secret" not in line
    assert line == f"{ref.batch_id[:14]}… chunk 1/1 rows 0-0 · 1 prompts · echo"


def test_sender_and_receiver_agree_on_the_visibility_timeout() -> None:
    app = make_celery(dataclasses.replace(Settings(), visibility_timeout_s=33.0))
    assert app.conf.broker_transport_options["visibility_timeout"] == 33.0
    assert app.conf.accept_content == ["json"]
    assert app.conf.task_acks_late
    assert app.conf.result_backend is None


@pytest.mark.parametrize("module", ["headrace.broker", "worker.app"])
def test_importing_it_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'engine'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_flushed_window_is_sent_again_before_and_beside_what_was_never_sent(
    store: Store, broker: Broker, settings: Settings, redis_server: RedisServer
) -> None:
    """New chunks take the room of the lost ones at once; the lost must not wait until a batch of a million has been sent."""
    # Both dispatches fall within the grace, on a busy machine too.
    settings = dataclasses.replace(settings, requeue_grace_s=2.0)
    submit(store, 40)
    assert dispatch(store, broker, settings, "echo") == 8
    redis_server.flush()
    assert dispatch(store, broker, settings, "echo") == 8
    assert [message.number for message in waiting_messages(settings)] == list(range(9, 17))
    time.sleep(settings.requeue_grace_s + 0.1)
    assert dispatch(store, broker, settings, "echo") == 8
    assert sorted(message.number for message in waiting_messages(settings)) == list(range(1, 17))
    assert dispatch(store, broker, settings, "echo") == 0


def test_a_hurry_that_redis_does_not_hear_is_said_so_soon(broker: Broker, redis_server: RedisServer) -> None:
    broker.hurry()
    redis_server.kill9()
    started = time.monotonic()
    with pytest.raises(QueueUnavailable):
        broker.hurry()
    assert time.monotonic() - started < 5, "a client waits for its cancel"
