"""Whatever dies, every prompt has exactly one answer. Real processes; the engine is an echo, so that minutes become seconds.

On SQLite where nothing else is said; test_engine.py does the same on PostgreSQL with the real engine. Zombies, duplicates and what becomes
of Redis and the network are the fault tests of tests/chaos.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from servers import PostgresServer, RedisServer
from worker_process import QUICK, wait_for, worker_process

from headrace.batch import BatchStatus
from headrace.broker import KEY_PREFIX, dispatch
from headrace.settings import Settings

SLOW = {"ECHO_PAUSE_S": "0.3"}


def texts(total: int) -> list[str]:
    return [f"prompt {index} " + "word " * (index % 7) for index in range(total)]


def test_a_killed_worker_is_replaced_and_nothing_is_done_twice(echo_service, sqlite_url: str) -> None:
    service = echo_service(sqlite_url)
    prompts = texts(600)
    with service.worker(environ=SLOW) as first:
        service.ready(first)
        batch_id = service.submit(prompts)
        wait_for(lambda: service.done(batch_id) >= 100, timeout_s=30, what="a sixth is done", process=first)
        first.kill9()
    before = {row.index: row for row in service.store.stream_results(batch_id)}
    assert 100 <= len(before) < 600
    with service.worker(environ=SLOW) as second:
        batch = service.wait_over(batch_id, second)
    assert batch.status is BatchStatus.COMPLETED
    rows = service.assert_exactly_once(batch_id, 600)
    assert [row.choices[0].text for row in rows] == [f"echo {text}" for text in prompts]
    assert all(rows[index] == row for index, row in before.items()), "a recorded answer is never written again"


def test_a_redis_that_is_restarted_or_killed_is_found_again(echo_service, sqlite_url: str, redis_server: RedisServer) -> None:
    service = echo_service(sqlite_url)
    with service.worker(environ=SLOW) as worker:
        service.ready(worker)
        batch_id = service.submit(texts(500))
        wait_for(lambda: service.done(batch_id) >= 50, timeout_s=30, what="under way", process=worker)
        redis_server.restart()
        wait_for(lambda: service.done(batch_id) >= 200, timeout_s=40, what="it goes on", process=worker)
        redis_server.kill9()
        redis_server.start()
        service.wait_over(batch_id, worker)
    service.assert_exactly_once(batch_id, 500)


def test_a_worker_whose_database_is_away_leaves_the_messages_to_others(
    echo_service, postgres_url: str, postgres_server: PostgresServer
) -> None:
    service = echo_service(postgres_url, chunk_size=4, reconcile_interval_s=60.0)
    with service.worker(concurrency=8) as worker:
        service.ready(worker)
        batch_id = service.submit(texts(80), send=False)
        messages = [service.store.chunk_message(ref) for ref in service.store.next_chunks(model="echo", limit=99, grace_s=60)]
        assert len(messages) > 3, "the worker itself may have sent some meanwhile"
        postgres_server.kill9()
        for message in messages:
            service.broker.enqueue(message)
        wait_for(lambda: "store_outage" in worker.log_tail(), timeout_s=20, what="the outage is noticed", process=worker)
        time.sleep(2)
        assert service.broker.count_waiting("echo") >= len(messages) - 3, "those that it can't work on are anybody's"
        postgres_server.start()
        service.wait_over(batch_id, worker, timeout_s=20)
        assert "store_back" in worker.log_tail(10**6)
    service.assert_exactly_once(batch_id, 80)


def test_an_engine_that_is_given_up_ends_its_worker_and_no_prompt_fails_of_it(echo_service, sqlite_url: str) -> None:
    service = echo_service(sqlite_url, visibility_timeout_s=60.0, lease_s=60.0, requeue_grace_s=60.0)
    batch_id = service.submit(texts(200))
    with service.worker(environ={"ECHO_ANSWERS": "100"}) as first:
        assert first.wait(30) == 1
        assert "[engine_lost]" in first.log_tail(10**6)
    assert service.done(batch_id) == 100
    assert service.store.count_in_flight(model="echo", grace_s=0) == 0
    with service.worker() as second:
        service.wait_over(batch_id, second, timeout_s=20)
    assert service.store.get_batch(batch_id).counts.failed == 0
    service.assert_exactly_once(batch_id, 200)


def test_a_worker_is_stopped_while_its_model_loads(echo_service, sqlite_url: str) -> None:
    service = echo_service(sqlite_url)
    with service.worker(environ={"ECHO_LOAD_S": "60"}) as worker:
        wait_for(lambda: "model_loading" in worker.log_tail(), timeout_s=20, what="it loads", process=worker)
        worker.terminate()
        assert worker.wait(5) == 0


def test_a_worker_waits_for_redis_and_for_the_tables(make_service, tmp_path: Path, redis_server: RedisServer) -> None:
    settings = Settings(
        model="echo", engine_frontend="echo_frontend:EchoFrontend", redis_url=redis_server.url, home=tmp_path,
        database_url=f"sqlite:///{tmp_path}/late.db", **QUICK,
    )  # fmt: skip
    redis_server.stop()
    with worker_process(settings, tmp_path / "early.log") as worker:
        wait_for(lambda: "headrace migrate" in worker.log_tail(), timeout_s=20, what="it says what is missing", process=worker)
        service = make_service(settings.database_url, model="echo")
        service.ready(worker)
        batch_id = service.submit(texts(20), send=False)
        redis_server.start()
        service.wait_over(batch_id, worker, timeout_s=30)
        redis_server.stop()
        worker.terminate()
        assert worker.wait(20) == 0, "it ends without Redis, too"


def test_a_batch_that_was_committed_but_never_sent_is_found(echo_service, sqlite_url: str) -> None:
    service = echo_service(sqlite_url)
    with service.worker() as worker:
        service.ready(worker)
        batch_id = service.submit(texts(40), send=False)
        service.wait_over(batch_id, worker, timeout_s=15)
    service.assert_exactly_once(batch_id, 40)


def test_sigterm_lets_chunks_end_and_hands_back_the_rest(echo_service, sqlite_url: str) -> None:
    service = echo_service(sqlite_url, drain_timeout_s=1.0)
    prompts = texts(200)
    with service.worker(concurrency=2, environ={"ECHO_PAUSE_S": "30"}) as stuck:
        service.ready(stuck)
        batch_id = service.submit(prompts)
        wait_for(
            lambda: service.store.count_in_flight(model="echo", grace_s=0) == 2, timeout_s=20, what="two chunks", process=stuck
        )
        stuck.terminate()
        assert stuck.wait(15) == 0
    assert service.store.count_in_flight(model="echo", grace_s=0) == 0, "handed back, not left to their leases"
    assert service.store.list_workers() == []
    with service.worker(environ={"ECHO_PAUSE_S": "0.5"}, drain_timeout_s=20.0) as brief:
        service.ready(brief)
        wait_for(
            lambda: service.store.count_in_flight(model="echo", grace_s=0), timeout_s=20, what="chunks taken", process=brief
        )
        brief.terminate()
        assert brief.wait(20) == 0
    done = service.done(batch_id)
    assert done > 0
    assert done % 16 in (0, 200 % 16), "the chunks that ran were ended"
    with service.worker() as last:
        service.wait_over(batch_id, last)
    service.assert_exactly_once(batch_id, 200)


def test_a_cancelled_batch_stops_soon(echo_service, sqlite_url: str) -> None:
    service = echo_service(sqlite_url)
    with service.worker(environ={"ECHO_PAUSE_S": "60"}) as worker:
        service.ready(worker)
        batch_id = service.submit(texts(300))
        wait_for(
            lambda: service.store.count_in_flight(model="echo", grace_s=0), timeout_s=20, what="chunks taken", process=worker
        )
        service.store.cancel_batch(batch_id)
        service.broker.hurry()
        batch = service.wait_over(batch_id, worker, timeout_s=6)
        assert batch.status is BatchStatus.CANCELLED
        next_id = service.submit(["still alive"])
        wait_for(
            lambda: service.store.count_in_flight(model="echo", grace_s=0) == 1,
            timeout_s=10,
            what="it works on",
            process=worker,
        )
    rows = service.assert_exactly_once(batch_id, 300)
    assert {row.error.code for row in rows} == {"batch_cancelled"}
    assert service.done(next_id) == 0


def test_a_long_chunk_is_not_delivered_twice(echo_service, sqlite_url: str) -> None:
    """Its work takes three visibility timeouts and three leases."""
    service = echo_service(sqlite_url, visibility_timeout_s=2.0, lease_s=2.0, requeue_grace_s=1.0)
    with service.worker(environ={"ECHO_PAUSE_S": "6"}) as worker:
        service.ready(worker)
        batch_id = service.submit(texts(16))
        service.wait_over(batch_id, worker, timeout_s=30)
        # The batch is over with its last row; the worker says so, and ends the chunk, only then.
        wait_for(lambda: "chunk_ended" in worker.log_tail(), timeout_s=20, what="the chunk ends", process=worker)
        assert "chunk_skipped" not in worker.log_tail(), "no second delivery while the first was at work"
    service.assert_exactly_once(batch_id, 16)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine_frontend": "echo_frontend:Missing"}, "HEADRACE_ENGINE_FRONTEND"),
        ({"engine_config": '{"tp": 0}'}, "HEADRACE_ENGINE_CONFIG"),
    ],
)
def test_a_worker_that_cannot_start_says_why_and_exits_nonzero(echo_service, sqlite_url: str, changes: dict, says: str) -> None:
    service = echo_service(sqlite_url)
    with service.worker(**changes) as worker:
        assert worker.wait(30) == 1
        assert "this worker can't start" in worker.log_tail()
        assert says in worker.log_tail()
        assert "Traceback" not in worker.log_tail()


def test_redis_holds_a_window_and_no_more(echo_service, sqlite_url: str) -> None:
    import redis

    service = echo_service(sqlite_url, dispatch_window=10, chunk_size=1)
    service.submit(texts(100))
    for _ in range(5):
        dispatch(service.store, service.broker, service.settings, "echo")
    assert service.broker.count_waiting("echo") == 10
    client = redis.Redis.from_url(service.settings.redis_url)
    assert all(key.startswith(KEY_PREFIX.encode()) for key in client.keys("*"))
    client.close()
