"""Reading a batch's file: the same rows whoever reads it, wherever it is cut into parts, and whenever a reader is killed or cancelled."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, update
from store_driver import check, count, execute, take, work_off

from headrace.batch import CHAT, ROWS, TEXT, BatchStatus, Item
from headrace.batch_input import _cached_config
from headrace.config import GenerationConfig
from headrace.errors import Conflict, InvalidRequest, NotFound, QueueFull
from headrace.ingest import read_next
from headrace.settings import Settings
from headrace.store import Store
from headrace.store import files as file_queries
from headrace.store import ingest as ingest_queries
from headrace.store.creation import Order, new_batch_id, open_batch
from headrace.store.ingest import MAX_ATTEMPTS, IngestStatus, Place
from headrace.store.session import insert_new
from headrace.store.tables import batches, completions, file_parts, files, ingests, prompts

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(model="m", max_prompts=100_000)


def upload(store: Store, content: bytes, *, cuts: list[int] | None = None, owner: str | None = None) -> str:
    file_id = store.files.begin(filename="a.jsonl", purpose="batch", owner=owner)
    edges = [0, *(cuts if cuts is not None else range(1 << 20, len(content), 1 << 20)), len(content)]
    parts = [content[a:b] for a, b in pairwise(edges) if b > a]
    for number, part in enumerate(parts):
        store.files.append(file_id, number, part)
    store.files.complete(file_id, size=len(content), lines=content.count(b"\n"), parts=len(parts))
    return file_id


def lines(total: int, **body: Any) -> list[bytes]:
    return [
        json.dumps(
            {"custom_id": f"c{i}", "method": "POST", "url": CHAT,
             "body": {"messages": [{"role": "user", "content": f"prompt {i} é"}], **body}}, ensure_ascii=False,
        ).encode()
        for i in range(total)
    ]  # fmt: skip


def order(**options: Any) -> Order:
    return Order(**{"gen_config": GenerationConfig(), "model": "m", "endpoint": CHAT, **options})


def rows(store: Store, batch_id: str) -> list[tuple[int, str | None, str | None, str | None]]:
    query = select(prompts.c.index, prompts.c.body, prompts.c.custom_id, prompts.c.gen_config)
    query = query.where(prompts.c.batch_id == batch_id).order_by(prompts.c.index)
    return [tuple(row) for row in store._database.read(lambda connection: connection.execute(query).all())]  # type: ignore[misc]


def test_lines_are_read_the_same_wherever_parts_are_cut(store: Store) -> None:
    rng = random.Random(5)
    content = b"\n".join([*lines(40, max_tokens=3)[:20], b"", *lines(40, n=200)[20:], b"   "]) + rng.choice([b"", b"\n"])
    expected = None
    for cuts in ([], list(range(1, len(content), 37)), sorted(rng.sample(range(1, len(content)), 60)), list(range(1, 400))):
        batch_id = store.ingests.create(order(), upload(store, content, cuts=cuts))
        assert read_next(store, SETTINGS) == batch_id
        batch = check(store, batch_id)
        assert (batch.counts.total, batch.counts.failed) == (40, 20)
        found = rows(store, batch_id)
        assert [row[2] for row in found] == [f"c{i}" for i in range(40)]
        assert [row[1] is None for row in found] == [False] * 20 + [True] * 20
        expected = expected or found
        assert found == expected
    assert read_next(store, SETTINGS) is None


def test_a_line_without_end_costs_no_memory_and_fails_the_batch(store: Store) -> None:
    content = lines(1)[0] + b"\n" + b"x" * (6 << 20) + b"\n" + b"y" * (5 << 20)
    batch_id = store.ingests.create(order(), upload(store, content))
    read_next(store, SETTINGS)
    batch = check(store, batch_id)
    assert batch.status is BatchStatus.FAILED
    assert [(error["code"], error["line"]) for error in batch.errors] == [("invalid_json_line", 2), ("invalid_json_line", 3)]


def test_a_file_with_too_many_lines_is_refused(store: Store) -> None:
    batch_id = store.ingests.create(order(), upload(store, b"\n".join(lines(12))))
    read_next(store, Settings(model="m", max_prompts=11))
    batch = check(store, batch_id)
    assert (batch.status, batch.errors[0]["code"], batch.errors[0]["line"]) == (BatchStatus.FAILED, "too_many_requests", 12)
    assert count(store, prompts) == 0


def test_a_reader_that_lost_its_lease_writes_nothing(store: Store) -> None:
    batch_id = store.ingests.create(order(), upload(store, b"\n".join(lines(5))))
    old = store.ingests.claim()
    assert old is not None
    assert store.ingests.claim() is None, "its lease holds"
    execute(store, update(ingests).values(lease_until=1.0))
    new = store.ingests.claim()
    assert new is not None
    assert new.epoch == old.epoch + 1
    items = [Item("late", custom_id="late")]
    assert store.ingests.append(old, items, Place(0, 9, 1, 1)) is IngestStatus.FENCED
    assert store.ingests.keep(old) is IngestStatus.FENCED
    assert store.ingests.finish(old, total=1) is IngestStatus.FENCED
    assert store.ingests.discard(old, [], rows=1) is IngestStatus.FENCED
    store.ingests.release(old)
    assert store.ingests.claim() is None
    store.ingests.release(new)
    assert read_next(store, SETTINGS) == batch_id
    assert [row[2] for row in rows(store, batch_id)] == [f"c{i}" for i in range(5)]


def test_a_reader_stops_at_a_slice_and_the_next_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.ingest.SLICE_ROWS", 3)
    batch_id = store.ingests.create(order(), upload(store, b"\n".join(lines(20))))
    for stored in (3, 6, 9):
        read_next(store, SETTINGS, stop=lambda: True)
        assert count(store, prompts) == stored
        assert store.get_batch(batch_id).status is BatchStatus.VALIDATING
    read_next(store, SETTINGS)
    batch = check(store, batch_id)
    assert (batch.status, batch.counts.total) == (BatchStatus.IN_PROGRESS, 20)
    work_off(store, take(store))
    assert check(store, batch_id).status is BatchStatus.COMPLETED


@pytest.mark.parametrize("is_reading", [False, True])
def test_a_batch_is_cancelled_while_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch, is_reading: bool) -> None:
    monkeypatch.setattr("headrace.ingest.SLICE_ROWS", 3)
    file_id = upload(store, b"\n".join(lines(20, n=200)))
    batch_id = store.ingests.create(order(), file_id)
    with pytest.raises(Conflict):
        store.files.delete(file_id)

    def stop() -> bool:
        store.cancel_batch(batch_id)
        return False

    if not is_reading:
        assert store.cancel_batch(batch_id).status is BatchStatus.CANCELLING
    read_next(store, SETTINGS, stop=stop)
    batch = check(store, batch_id)
    assert (batch.status, batch.counts.total, batch.errors) == (BatchStatus.CANCELLED, 0, ())
    assert count(store, prompts) == count(store, completions) == count(store, ingests) == 0
    store.files.delete(file_id)


def test_a_removal_that_was_cut_short_goes_on_and_is_not_taken_for_the_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names that were used twice may be among those that are removed already."""
    monkeypatch.setattr("headrace.store.ingest.DISCARD_ROWS", 4)
    content = b"\n".join([*lines(10), *lines(1)])
    batch_id = store.ingests.create(order(), upload(store, content))

    def breaks(ingest: Any, errors: Any, *, rows: int) -> IngestStatus:
        store._database.write(lambda connection: ingest_queries._remove(connection, ingest, 0))
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(store.ingests, "discard", breaks)
        with pytest.raises(RuntimeError):
            read_next(store, SETTINGS)
    assert count(store, prompts) == 7
    execute(store, update(ingests).values(lease_until=1.0))
    read_next(store, SETTINGS)
    batch = check(store, batch_id)
    assert (batch.status, [error["code"] for error in batch.errors]) == (BatchStatus.FAILED, ["duplicate_custom_id"])
    assert count(store, prompts) == 0


def test_a_file_that_ends_every_reader_fails_its_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = store.ingests.create(order(), upload(store, b"\n".join(lines(3))))
    for _ in range(MAX_ATTEMPTS):
        assert store.ingests.claim() is not None
        execute(store, update(ingests).values(lease_until=1.0))
    read_next(store, SETTINGS)
    assert (store.get_batch(batch_id).status, store.get_batch(batch_id).errors[0]["code"]) == (
        BatchStatus.FAILED,
        "ingest_failed",
    )


def test_a_batch_of_a_file_waits_for_no_sender(store: Store) -> None:
    """Its prompts come from the file: neither the sweep of senders that went away nor a second request with its key takes it."""
    file_id = upload(store, b"\n".join(lines(3)))
    batch_id = store.ingests.create(order(idempotency_key="k"), file_id)
    execute(store, update(batches).values(updated_at=1.0))
    store.expire_batches()
    assert store.ingests.create(order(idempotency_key="k"), file_id) == batch_id
    with pytest.raises(InvalidRequest):
        store.ingests.create(order(idempotency_key="k", priority=1), file_id)
    assert store.get_batch(batch_id).status is BatchStatus.VALIDATING
    with pytest.raises(QueueFull):
        store.ingests.create(order(max_open_prompts=1), file_id)
    with pytest.raises(NotFound):
        store.ingests.create(order(), file_id, scope="somebody else")
    read_next(store, SETTINGS)
    assert check(store, batch_id).counts.total == 3


def test_what_nobody_completes_and_what_expired_is_swept(store: Store) -> None:
    kept = upload(store, b"{}\n")
    expired = upload(store, b"{}\n")
    busy = upload(store, b"\n".join(lines(2)))
    store.ingests.create(order(), busy)
    left = store.files.begin(filename="a", purpose="batch")
    store.files.append(left, 0, b"{")
    execute(store, update(files).where(files.c.id.in_([expired, busy])).values(expires_at=1.0))
    execute(store, update(files).where(files.c.id == left).values(updated_at=1.0))
    assert store.files.sweep() == 2
    assert {file.id for file in store.files.list()} == {kept, busy}
    with pytest.raises(Conflict):
        store.files.append(left, 1, b"{")
    read_next(store, SETTINGS)
    assert store.files.sweep() == 1, "its batch is read"
    execute(store, update(files).values(created_at=1.0))
    assert store.files.sweep(retention_s=60) == 1
    assert count(store, file_parts) == 0


def test_a_file_that_expires_while_a_batch_of_it_comes_in_stays(store: Store) -> None:
    """Who accepts the batch holds the file; whoever wants to sweep it waits, and must look anew afterwards."""
    file_id = upload(store, b"\n".join(lines(2)))
    execute(store, update(files).values(expires_at=1.0))
    swept: list[int] = []
    sweeper = threading.Thread(target=lambda: swept.append(store.files.sweep()))

    def accept(connection: Connection) -> str:
        file_queries.lock(connection, file_id)
        sweeper.start()
        time.sleep(0.5)  # the sweeper is at the file now
        batch_id = new_batch_id()
        open_batch(connection, batch_id, order(), input_file_id=file_id)
        connection.execute(
            insert_new(connection, ingests).values(batch_id=batch_id, file_id=file_id, chunk_size=64, created_at=1.0)
        )
        return batch_id

    batch_id = store._database.write(accept)
    sweeper.join()
    assert swept == [0]
    assert read_next(store, SETTINGS) == batch_id
    assert check(store, batch_id).counts.total == 2
    assert store.files.sweep() == 1


KILLED = """
import sys
sys.path[:0] = [sys.argv[1]]
import headrace.ingest
from headrace.settings import Settings
from headrace.store import Store
headrace.ingest.SLICE_ROWS = 20
with Store(sys.argv[2]) as store:
    print("reading", flush=True)
    headrace.ingest.read_next(store, Settings(model="m"))
"""


def test_a_reader_is_killed_at_any_moment_and_nothing_is_lost_or_read_twice(store: Store, store_url: str) -> None:
    # Each kill takes a second and a half: HEADRACE_TEST_KILLS=60 is the long form.
    kills = int(os.environ.get("HEADRACE_TEST_KILLS", "6"))
    total = 400 * kills
    batch_id = store.ingests.create(order(), upload(store, b"\n".join(lines(total, seed=5)), cuts=None))
    draw, seen = random.Random(kills), []
    for _ in range(kills):
        execute(store, update(ingests).values(lease_until=1.0, attempts=0))
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(ROOT), store_url],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            time.sleep(draw.uniform(0, 0.12))
            process.send_signal(signal.SIGKILL)
        seen.append(count(store, prompts))
    assert seen == sorted(seen)
    execute(store, update(ingests).values(lease_until=1.0))
    while store.get_batch(batch_id).status is BatchStatus.VALIDATING:
        assert read_next(store, SETTINGS) == batch_id
    assert check(store, batch_id).counts.total == total
    assert [row[2] for row in rows(store, batch_id)] == [f"c{i}" for i in range(total)]
    assert seen[-1] > 0, "no reader got to store a slice before it was killed"


def test_a_schema_of_its_own_in_each_line_costs_no_memory_that_stays(store: Store) -> None:
    """What is remembered of configs is bounded in bytes: large ones are checked anew."""
    schema = {"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(100)}}
    content = b"\n".join(
        json.dumps(
            {"custom_id": f"c{i}", "method": "POST", "url": CHAT,
             "body": {"messages": [{"role": "user", "content": "q"}],
                      "response_format": {"type": "json_schema", "json_schema": {"name": f"n{i}", "schema": schema}}}}
        ).encode()
        for i in range(30)
    )  # fmt: skip
    kept = _cached_config.cache_info().currsize
    batch_id = store.ingests.create(order(), upload(store, content))
    read_next(store, SETTINGS)
    assert check(store, batch_id).counts.failed == 0
    assert _cached_config.cache_info().currsize == kept
    assert [json.loads(row[3])["response_format"]["json_schema"]["name"] for row in rows(store, batch_id) if row[3]] == [
        f"n{i}" for i in range(30)
    ]


@pytest.mark.parametrize("endpoint", [CHAT, TEXT, ROWS])
def test_half_a_character_in_a_prompt_fails_its_line_alone(store: Store, endpoint: str) -> None:
    """JSON can say it, and a text that some JavaScript cut inside an emoji does; no encoding carries it."""

    def line(number: int, text: str) -> bytes:
        messages = [{"role": "user", "content": text}]
        if endpoint == ROWS:
            return json.dumps({"messages": messages} if number % 2 else text).encode()
        body = {"messages": messages} if endpoint == CHAT else {"prompt": text}
        return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": endpoint, "body": body}).encode()

    texts = ["whole 🚰", "cut \ud83d", "\udeb0", "whole"]
    content = b"\n".join(line(number, text) for number, text in enumerate(texts))
    batch_id = store.ingests.create(order(endpoint=endpoint), upload(store, content))
    assert read_next(store, SETTINGS) == batch_id
    batch = check(store, batch_id)
    assert (batch.status, batch.counts.total, batch.counts.failed) == (BatchStatus.IN_PROGRESS, 4, 2)
    work_off(store, take(store))
    assert check(store, batch_id).status is BatchStatus.COMPLETED
    failed = {row.index: row.error for row in store.stream_results(batch_id) if row.error is not None}
    assert sorted(failed) == [1, 2]
    assert all(error.code == "invalid_request" and "surrogate" in error.message for error in failed.values())
