"""The real `openai` client reads, lists and cancels our batches as typed objects, and sees our problems as its exceptions."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from live_api import LiveApi, work
from openai.types import Batch

from headrace.config import GenerationConfig
from headrace.store import Store


@pytest.fixture
def client(api: LiveApi) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="any") as client:
        yield client


def new_batch(store: Store, count: int = 3) -> str:
    return store.create_batch(["p"] * count, GenerationConfig(), model="echo", metadata={"k": "v"}).id


def test_a_batch_is_a_typed_object(client: openai.OpenAI, store: Store) -> None:
    batch_id = new_batch(store)
    work(store, failing=[1])
    batch = client.batches.retrieve(batch_id)
    # Strict: the client itself builds objects without looking at the types.
    Batch.model_validate(batch.model_dump(), strict=True)
    assert (batch.id, batch.object, batch.status, batch.model) == (batch_id, "batch", "completed", "echo")
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (6, 9, 15)
    assert batch.usage.input_tokens_details.cached_tokens == 1
    assert batch.metadata == {"k": "v"}
    assert isinstance(batch.completed_at, int)
    assert (batch.errors, batch.failed_at, batch.output_file_id) == (None, None, None)
    assert batch.model_extra is not None
    assert batch.model_extra["headrace"]["progress"] == 1.0
    assert batch._request_id


def test_auto_paging_walks_every_page(client: openai.OpenAI, store: Store) -> None:
    ids = [new_batch(store, 1) for _ in range(7)][::-1]
    assert [batch.id for batch in client.batches.list(limit=2)] == ids
    page = client.batches.list(limit=5)
    assert (len(page.data), page.has_more) == (5, True)
    assert all(isinstance(batch, Batch) for batch in page.data)


def test_cancel_and_its_conflict(client: openai.OpenAI, store: Store) -> None:
    batch_id = new_batch(store)
    cancelled = client.batches.cancel(batch_id)
    assert cancelled.status == "cancelled"
    assert isinstance(cancelled.cancelled_at, int)
    calls = []
    counted = client.with_options(http_client=httpx.Client(event_hooks={"request": [calls.append]}))
    with counted, pytest.raises(openai.ConflictError) as caught:
        counted.batches.cancel(batch_id)
    assert caught.value.code == "conflict"
    assert len(calls) == 1, "x-should-retry: false keeps the client from trying again"


def test_problems_carry_what_the_client_looks_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.batches.retrieve("batch_" + "0" * 32)
    assert caught.value.code == "not_found"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    # OpenAI's clients for Node and Go read nothing but `error`; what headrace adds is beside it.
    problem = caught.value.response.json()
    inner = {"message": problem["detail"], "type": "invalid_request_error", "param": "batch_id", "code": "not_found"}
    assert problem["error"] == inner
    assert problem["type"] == "/docs#problem-not_found"
    with pytest.raises(openai.NotFoundError) as refused:
        client.batches.create(input_file_id="file-1", endpoint="/v1/chat/completions", completion_window="24h")
    assert refused.value.param == "input_file_id"
    assert "POST /v1/files" in str(refused.value), "the text of the exception says what to do"
    with pytest.raises(openai.APIStatusError) as absent:
        client.chat.completions.create(model="echo", messages=[])
    assert "/docs" in str(absent.value)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo", "org/other"]
    assert client.models.retrieve("org/other").owned_by == "headrace"
