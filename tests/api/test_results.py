"""Completions come back in input order, in pages and as a stream, and a cursor never steps over a row that is still to come."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from live_api import LiveApi, work
from store_driver import answer

from headrace.completion import Choice, Completion, TokenLogprobs
from headrace.config import GenerationConfig
from headrace.schemas import read_completion
from headrace.store import Store

PROMPTS_MANY = 20_000


def new_batch(store: Store, count: int) -> str:
    return store.create_batch([f"p{i}" for i in range(count)], GenerationConfig(), model="echo", chunk_size=256).id


def test_pages_lead_from_one_to_the_next_in_input_order(http: httpx.Client, store: Store) -> None:
    batch_id = new_batch(store, 25)
    work(store, failing=[4])
    rows, path = [], f"/v1/batches/{batch_id}/results?limit=10"
    while path:
        response = http.get(path)
        page = response.json()
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["index"], page["data"][-1]["index"])
        assert page["has_more"] == (page["next"] is not None)
        rows += page["data"]
        path = page["next"]
    assert [Completion.from_dict(row) for row in rows] == store.results(batch_id)
    assert rows[4]["error"] == {"code": "engine_error", "message": "no"}
    assert response.headers["headrace-status"] == "completed"
    assert "retry-after" not in response.headers


def test_a_reader_of_a_running_batch_waits_at_the_first_gap(http: httpx.Client, store: Store) -> None:
    batch_id = new_batch(store, 6)
    (ref,) = store.next_chunks(model="echo", limit=9, grace_s=0)
    claim = store.claim_chunk(ref.chunk_id, worker="w", lease_s=60)
    assert claim is not None
    path = f"/v1/batches/{batch_id}/results"
    store.record(claim, [answer(1), answer(3)])
    page = http.get(path).json()
    assert (page["data"], page["has_more"]) == ([], True)
    assert page["next"].endswith("after=-1&limit=100")
    store.record(claim, [answer(0)])
    page = http.get(path)
    assert [row["index"] for row in page.json()["data"]] == [0, 1], "3 is done, but 2 is not: after=3 would lose 2 for ever"
    assert "retry-after" in page.headers
    stream = http.get(path + ".jsonl", params={"after": 0})
    assert [json.loads(line)["index"] for line in stream.text.splitlines()] == [1]
    assert (stream.headers["headrace-status"], stream.headers["headrace-total"]) == ("in_progress", "6")
    store.record(claim, [answer(2), answer(4), answer(5)])
    assert store.finish_chunk(claim)
    page = http.get(page.json()["next"]).json()
    assert [row["index"] for row in page["data"]] == [2, 3, 4, 5]
    assert page["next"] is None


def test_twenty_thousand_rows_stream_in_order(http: httpx.Client, store: Store) -> None:
    batch_id = new_batch(store, PROMPTS_MANY)
    work(store)
    with http.stream("GET", f"/v1/batches/{batch_id}/results", headers={"accept": "application/x-ndjson"}) as response:
        assert response.headers["content-type"].startswith("application/x-ndjson")
        indexes = [json.loads(line)["index"] for line in response.iter_lines()]
    assert indexes == list(range(PROMPTS_MANY))
    tail = http.get(f"/v1/batches/{batch_id}/results.jsonl", params={"after": PROMPTS_MANY - 3})
    assert [read_completion(line) for line in tail.text.splitlines()] == store.results(batch_id, after=PROMPTS_MANY - 3)
    assert http.get(f"/v1/batches/{batch_id}/results.jsonl", params={"after": PROMPTS_MANY + 5}).content == b""


def test_a_stream_holds_one_page_at_a_time(api: LiveApi, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stops reading stops the server's reading too: nothing piles up."""
    batch_id = new_batch(store, 8000)
    work(store)
    pages = []
    original = store.results
    monkeypatch.setattr(store, "results", lambda *args, **named: pages.append(named) or original(*args, **named))
    with api.http() as http, http.stream("GET", f"/v1/batches/{batch_id}/results.jsonl") as response:
        next(response.iter_raw(10))
        threading.Event().wait(0.5)
        read_ahead = len(pages)
    assert all(page["limit"] <= 256 for page in pages)
    assert 1 <= read_ahead < 8000 / 256, "the server read everything for a reader who took one line"


def test_odd_values_survive_the_wire(http: httpx.Client, store: Store) -> None:
    batch_id = new_batch(store, 1)
    (ref,) = store.next_chunks(model="echo", limit=9, grace_s=0)
    claim = store.claim_chunk(ref.chunk_id, worker="w", lease_s=60)
    assert claim is not None
    logprobs = (TokenLogprobs(token_id=1, logprob=-0.5, top=((1, -0.5), (2, -float("inf")))),)
    odd = Choice(index=0, text="\x00 \u2028 \n 🎉 \ud83d", token_ids=(1,), finish_reason="length", logprobs=logprobs)
    store.record(claim, [Completion(index=0, choices=(odd,), prompt_logprobs=logprobs)])
    store.finish_chunk(claim)
    for reply in (
        http.get(f"/v1/batches/{batch_id}/results.jsonl").content,
        json.dumps(http.get(f"/v1/batches/{batch_id}/results").json()["data"][0]).encode(),
    ):
        completion = read_completion(reply.splitlines()[0])
        assert completion.prompt_logprobs == logprobs
        (choice,) = completion.choices
        assert choice.text == "\x00 \u2028 \n 🎉 \ufffd"
        assert choice.logprobs == logprobs


def test_no_reader_of_lines_cuts_an_answer_in_two(http: httpx.Client, store: Store) -> None:
    """`str.splitlines` and httpx's `iter_lines`, which OpenAI's client has, end a line at these characters, too."""
    batch_id = store.create_batch(["a"], GenerationConfig(), model="echo", endpoint="/v1/chat/completions").id
    (ref,) = store.next_chunks(model="echo", limit=9, grace_s=0)
    claim = store.claim_chunk(ref.chunk_id, worker="w", lease_s=60)
    assert claim is not None
    text = "a\u2028b\u2029c\u0085d é"
    store.record(claim, [Completion(index=0, choices=(Choice(index=0, text=text, token_ids=(1,), finish_reason="stop"),))])
    store.finish_chunk(claim)
    [line] = http.get(f"/v1/batches/{batch_id}/results.jsonl").text.splitlines()
    assert read_completion(line).choices[0].text == text
    file_id = store.get_batch(batch_id).file_id("output")
    [line] = http.get(f"/v1/files/{file_id}/content").text.splitlines()
    assert json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] == text


def test_bad_cursors_are_refused_by_name(http: httpx.Client, store: Store) -> None:
    path = f"/v1/batches/{new_batch(store, 1)}/results"
    for query in ("after=-2", "after=x", "limit=0", "limit=1001", "limit=x", "after=99999999999"):
        response = http.get(f"{path}?{query}")
        assert response.status_code == 422, query
        assert response.json()["errors"][0]["field"] == query.partition("=")[0]
