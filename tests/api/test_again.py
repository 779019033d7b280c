"""Retrying, deleting, and a server that has enough to do, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from live_api import LiveApi, work
from servers import wait_until

from headrace.batch import BatchStatus
from headrace.broker import Broker
from headrace.client import Client
from headrace.config import GenerationConfig
from headrace.errors import Conflict, NotFound, QueueFull
from headrace.settings import Settings
from headrace.store import Store
from headrace.store.batches import find_deleting


def test_failed_prompts_are_retried_and_the_old_batch_is_deleted(api: LiveApi, store: Store, broker: Broker) -> None:
    with Client(api.url) as client:
        old = client.submit([f"prompt {i}" for i in range(10)] + [""])
        with pytest.raises(Conflict):
            client.delete(old.id)
        with pytest.raises(Conflict, match="in_progress"):
            client.retry(old.id)
        work(store, failing=[2, 7])
        new = client.retry(old.id, idempotency_key="again")
        assert client.retry(old.id, idempotency_key="again").id == new.id
        assert (new.counts.total, new.metadata) == (2, {"retry_of": old.id})
        assert broker.count_waiting("echo") >= 1
        client.delete(old.id)
        with pytest.raises(NotFound, match=f"There is no batch '{old.id}'; GET /v1/batches lists"):
            client.get(old.id)
        with pytest.raises(NotFound):
            client.delete(old.id)
        assert [batch.id for batch in client.list()] == [new.id]


def test_a_long_cancel_and_a_long_deletion_go_on_behind_their_replies(
    api: LiveApi, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.batches.WRITE_PATIENCE_S", 0.0)
    monkeypatch.setattr("headrace.store.batches.DELETE_SLICE", 100)
    batch = store.create_batch([f"prompt {i}" for i in range(400)], GenerationConfig(), model="echo", chunk_size=1)
    with Client(api.url) as client:
        assert client.cancel(batch.id).status is BatchStatus.CANCELLING
        assert client.wait(batch.id, timeout=30).status is BatchStatus.CANCELLED
        assert len(list(client.results(batch.id))) == 400
        client.delete(batch.id)
        with pytest.raises(NotFound):
            client.get(batch.id)
    wait_until(lambda: store._database.read(find_deleting) == [], timeout_s=30)


def test_a_retry_is_a_submission_like_any_other(http: httpx.Client, store: Store) -> None:
    batch_id = http.post("/v1/batches", json={"prompts": ["a", "b"]}).json()["id"]
    http.post(f"/v1/batches/{batch_id}/cancel")
    response = http.post(f"/v1/batches/{batch_id}/retry")
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/batches/{response.json()['id']}"
    assert response.json()["headrace"]["queue"] == "sent"
    refused = http.post(f"/v1/batches/{response.json()['id']}/retry")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")


def test_a_retry_for_a_model_that_is_served_no_more_is_refused(settings: Settings, store: Store, broker: Broker) -> None:
    """As a submission is: nobody would ever answer it."""
    batch_id = store.create_batch(["a"], GenerationConfig(), model="yesterday's").id
    store.cancel_batch(batch_id)
    with LiveApi(settings, store=store, broker=broker) as api, api.http() as http:
        refused = http.post(f"/v1/batches/{batch_id}/retry")
        assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
        assert [batch["id"] for batch in http.get("/v1/batches").json()["data"]] == [batch_id]


def test_a_retry_whose_first_sending_is_still_being_stored_is_sent_again(http: httpx.Client, store: Store) -> None:
    """As a submission is: its reply may have been lost while it goes on. That a batch is not over is another conflict."""
    batch_id = http.post("/v1/batches", json={"prompts": ["a", "b"]}).json()["id"]
    http.post(f"/v1/batches/{batch_id}/cancel")
    key = {"idempotency-key": "again"}

    def sent_twice() -> Iterator[str]:
        yield "a"
        refused = http.post(f"/v1/batches/{batch_id}/retry", headers=key)
        assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "true")
        assert "again in a moment" in refused.json()["detail"]
        yield "b"

    store.create_batch(sent_twice(), GenerationConfig(), model="echo", idempotency_key="again")


def test_a_server_with_enough_to_do_says_when_to_come_again(settings: Settings, store: Store, broker: Broker) -> None:
    with LiveApi(replace(settings, max_open_prompts=5), store=store, broker=broker) as api, api.http() as http:
        body = {"prompts": ["a"] * 6}
        key = {"idempotency-key": "k"}
        first = http.post("/v1/batches", json=body, headers=key)
        assert first.status_code == 202
        response = http.post("/v1/batches", json=body)
        assert (response.status_code, response.json()["code"], response.headers["retry-after"]) == (429, "queue_full", "30")
        assert http.post("/v1/batches", json=body, headers=key).json()["id"] == first.json()["id"]
        with Client(api.url, max_retries=0) as client, pytest.raises(QueueFull):
            client.submit(["b"])
        work(store)
        assert http.post("/v1/batches", json=body).status_code == 202
