"""What a worker does beside its chunks: messages of another release, and batches that have outlived their time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

from echo_frontend import EchoFrontend
from servers import RedisServer
from worker_process import wait_for

from headrace.batch import BatchStatus
from headrace.broker import Broker
from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.store import Store
from worker.listener import Listener
from worker.runtime import Chore, Runtime
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


def test_a_chore_that_is_woken_comes_at_once() -> None:
    calls: Queue[int] = Queue()
    chore = Chore("test", lambda: calls.put(1), every_s=3600)
    chore.start()
    for _ in range(3):
        chore.wake()
        assert calls.get(timeout=5) == 1
    chore.stop()
    assert calls.empty()


def test_a_cancelled_batch_leaves_the_engine_as_soon_as_its_worker_hears_of_it(
    make_runtime: Callable[..., Runtime], store: Store
) -> None:
    engine = EchoFrontend("echo", pause_s=3600)
    runtime = make_runtime(engine)
    batch = store.create_batch(["a", "b", "c"], CONFIG, model="echo")
    [ref] = store.next_chunks(model="echo", limit=1, grace_s=60)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(generate_chunk, runtime, store.chunk_message(ref), lambda _: None)
        wait_for(lambda: runtime.host.prompts_inside == 3, timeout_s=10, what="at work")
        store.cancel_batch(batch.id)
        runtime.look_now()
        assert work.result(10).endswith("the batch is over") or "another worker" in work.result()
    assert sorted(engine.aborted) == [0, 1, 2]
    assert store.get_batch(batch.id).status is BatchStatus.CANCELLED
    engine.close()


def test_a_listener_hears_and_comes_back_with_redis(settings: Settings, broker: Broker, redis_server: RedisServer) -> None:
    heard: Queue[int] = Queue()
    listener = Listener(settings.redis_url, lambda: heard.put(1))
    listener.start()
    assert heard.get(timeout=5) == 1, "what was said before is made up for"
    broker.hurry()
    assert heard.get(timeout=5) == 1
    redis_server.kill9()
    redis_server.start()
    assert heard.get(timeout=10) == 1
    wait_for(lambda: broker.hurry() or not heard.empty(), timeout_s=5, what="it listens again", every_s=0.2)
    listener.stop()
