"""The batch resource over a real socket: submit, look, list, cancel, and the same request twice."""

from __future__ import annotations

import concurrent.futures
import itertools

import httpx
from live_api import LiveApi, work
from servers import RedisServer

from headrace.broker import Broker
from headrace.store import Store

OPENAI_FIELDS = [
    "id",
    "object",
    "endpoint",
    "model",
    "input_file_id",
    "completion_window",
    "status",
    "output_file_id",
    "error_file_id",
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
    "request_counts",
    "usage",
    "errors",
    "metadata",
]


def submit(http: httpx.Client, count: int = 3, **fields: object) -> dict:
    response = http.post("/v1/batches", json={"prompts": [f"prompt {i}" for i in range(count)], **fields})
    assert response.status_code == 202, response.text
    return response.json()


def test_a_submission_is_accepted_stored_and_sent(http: httpx.Client, store: Store, broker: Broker) -> None:
    response = http.post(
        "/v1/batches",
        json={
            "prompts": ["Hello", [{"role": "user", "content": "Hi"}]],
            "gen_config": {"max_new_tokens": 7, "stop_words": "###", "random_seed": 2**64 - 1},
            "metadata": {"k": "v"},
            "priority": 3,
            "completion_window": "48h",
        },
    )
    assert response.status_code == 202
    data = response.json()
    assert response.headers["location"] == f"/v1/batches/{data['id']}"
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert response.headers["headrace-queue"] == data["headrace"]["queue"] == "sent"
    batch = store.get_batch(data["id"])
    assert (batch.counts.total, batch.metadata, batch.priority, batch.model) == (2, {"k": "v"}, 3, "echo")
    assert (batch.gen_config.max_new_tokens, batch.gen_config.stop_words, batch.gen_config.random_seed) == (
        7,
        ("###",),
        2**64 - 1,
    )
    assert broker.count_waiting("echo") == 1


def test_the_object_has_every_openai_field_and_one_of_ours(http: httpx.Client) -> None:
    data = submit(http)
    assert [key for key in data if key != "headrace"]
    assert set(data) == {*OPENAI_FIELDS, "headrace"}
    unset = (
        "output_file_id",
        "error_file_id",
        "finalizing_at",
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelled_at",
        "errors",
    )
    assert all(data[name] is None for name in (*unset, "metadata"))
    assert isinstance(data["created_at"], int)
    assert data["expires_at"] == data["created_at"] + 86400
    assert data["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    assert data["usage"]["input_tokens_details"] == {"cached_tokens": 0}
    assert data["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    assert data["headrace"]["progress"] == 0.0
    assert data["headrace"]["gen_config"]["max_new_tokens"] == 512, "the effective config, defaults included"
    for path in data["headrace"]["links"].values():
        assert http.get(path).status_code != 404


def test_a_batch_that_is_over_says_so_and_asks_for_no_retry(http: httpx.Client, store: Store) -> None:
    batch_id = submit(http, 40)["id"]
    running = http.get(f"/v1/batches/{batch_id}")
    assert running.json()["status"] == "in_progress"
    assert "retry-after" in running.headers
    work(store, failing=[7])
    response = http.get(f"/v1/batches/{batch_id}")
    data = response.json()
    assert data["status"] == "completed"
    assert data["completed_at"] >= data["created_at"]
    assert data["request_counts"] == {"total": 40, "completed": 39, "failed": 1}
    assert data["usage"]["input_tokens"] == sum(range(1, 41))
    assert data["usage"]["output_tokens"] == sum(range(1, 80, 2))
    assert data["usage"]["total_tokens"] == data["usage"]["input_tokens"] + data["usage"]["output_tokens"]
    assert (data["headrace"]["progress"], data["headrace"]["eta_s"]) == (1.0, 0.0)
    assert data["headrace"]["tokens_per_second"] > 0
    assert "retry-after" not in response.headers


def test_an_unchanged_batch_costs_no_body(http: httpx.Client, store: Store) -> None:
    batch_id = submit(http, 20)["id"]
    path = f"/v1/batches/{batch_id}"
    tag = http.get(path).headers["etag"]
    unchanged = http.get(path, headers={"if-none-match": f'W/"other", {tag}'})
    assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", tag)
    assert "retry-after" in unchanged.headers
    work(store, only=[3])
    changed = http.get(path, headers={"if-none-match": tag})
    assert changed.status_code == 200
    assert changed.json()["request_counts"]["completed"] == 1
    assert changed.headers["etag"] != tag


def test_a_bad_prompt_fails_alone(http: httpx.Client, store: Store) -> None:
    bad = {
        1: "",
        2: [],
        3: [{"role": "wizard", "content": "x"}],
        4: [{"role": "user"}],
        5: [{"role": "user", "content": "x", "tool_calls": [{"id": "x"}]}],
        6: [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        7: "x" * (10 * 1024 * 1024),
        8: [{"role": "user", "content": "é" * 600_000}],
    }
    prompts = [bad.get(i, f"prompt {i}") for i in range(10)]
    response = http.post("/v1/batches", json={"prompts": prompts})
    assert response.status_code == 202
    assert response.json()["request_counts"] == {"total": 10, "completed": 0, "failed": 8}
    work(store)
    rows = http.get(f"/v1/batches/{response.json()['id']}/results").json()["data"]
    assert [row["index"] for row in rows] == list(range(10))
    errors = {row["index"]: row["error"] for row in rows if row["error"]}
    assert set(errors) == set(bad)
    assert {index for index, error in errors.items() if error["code"] == "payload_too_large"} == {7, 8}
    assert {errors[i]["code"] for i in (1, 2, 3, 4, 5, 6)} == {"invalid_request"}
    assert "wizard" in errors[3]["message"]
    assert "tool_calls" in errors[5]["message"]
    assert "1,048,576" in errors[7]["message"]


def test_a_batch_of_bad_prompts_only_is_over_at_once(http: httpx.Client) -> None:
    data = http.post("/v1/batches", json={"prompts": ["", ""]}).json()
    assert (data["status"], data["request_counts"]["failed"]) == ("completed", 2)


def test_pages_of_batches_meet_without_gap_or_repeat(http: httpx.Client) -> None:
    ids = [submit(http, 1)["id"] for _ in range(7)][::-1]
    seen, after = [], None
    for size in (3, 3, 1):
        page = http.get("/v1/batches", params={"limit": 3} | ({"after": after} if after else {})).json()
        assert len(page["data"]) == size
        assert page["has_more"] == (size == 3)
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        seen += [batch["id"] for batch in page["data"]]
        after = page["last_id"]
    assert seen == ids
    for unknown in ("batch_" + "0" * 32, "nonsense"):
        assert http.get("/v1/batches", params={"after": unknown}).status_code == 404
    assert http.get("/v1/batches", params={"status": "completed"}).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    assert len(http.get("/v1/batches", params={"status": "in_progress"}).json()["data"]) == 7


def test_cancel_ends_a_batch_and_a_second_cancel_is_a_conflict(http: httpx.Client) -> None:
    batch_id = submit(http, 5)["id"]
    first = http.post(f"/v1/batches/{batch_id}/cancel")
    assert first.status_code == 200
    assert first.json()["status"] == "cancelled"
    second = http.post(f"/v1/batches/{batch_id}/cancel")
    assert second.status_code == 409
    assert second.headers["x-should-retry"] == "false"
    assert second.json()["code"] == "conflict"
    rows = http.get(f"/v1/batches/{batch_id}/results").json()["data"]
    assert [row["error"]["code"] for row in rows] == ["batch_cancelled"] * 5


def test_an_unknown_batch_is_not_found(http: httpx.Client) -> None:
    paths = ["batch_" + "0" * 32, "batch_" + "G" * 32, "x", "batch_%00" + "0" * 31, "..%2f..", "é"]
    for path, (method, tail) in itertools.product(
        paths, (("GET", ""), ("GET", "/results"), ("GET", "/results.jsonl"), ("POST", "/cancel"))
    ):
        response = http.request(method, f"/v1/batches/{path}{tail}")
        assert response.status_code == 404, (path, method, tail)
        assert response.json()["code"] == "not_found"


def test_the_same_idempotency_key_gives_the_same_batch(http: httpx.Client) -> None:
    key = {"idempotency-key": "night-run-7"}
    body = {"prompts": ["a", "b"], "metadata": {"k": "v"}}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: http.post("/v1/batches", json=body, headers=key), range(8)))
    accepted = [reply.json()["id"] for reply in replies if reply.status_code == 202]
    waiting = [reply for reply in replies if reply.status_code == 409]
    assert len(set(accepted)) == 1
    assert len(accepted) + len(waiting) == 8
    assert all(reply.headers["x-should-retry"] == "true" for reply in waiting)
    assert len(http.get("/v1/batches").json()["data"]) == 1
    other = http.post("/v1/batches", json={**body, "prompts": ["a", "c"]}, headers=key)
    assert other.status_code == 422
    assert "key" in other.json()["detail"]
    assert http.post("/v1/batches", json=body, headers={b"idempotency-key": b"\xe9"}).status_code == 422
    assert http.post("/v1/batches", json=body, headers={"idempotency-key": "x" * 256}).status_code == 422


def test_a_batch_is_accepted_while_redis_is_down(api: LiveApi, redis_server: RedisServer, store: Store) -> None:
    redis_server.stop()
    try:
        with api.http() as http:
            response = http.post("/v1/batches", json={"prompts": ["a"]})
            assert response.status_code == 202
            assert response.headers["headrace-queue"] == response.json()["headrace"]["queue"] == "unavailable"
            assert http.get(f"/v1/batches/{response.json()['id']}").status_code == 200, "reading needs no Redis"
    finally:
        redis_server.start()
    assert len(store.next_chunks(model="echo", limit=10, grace_s=60)) == 1, "nothing is marked as sent that was not"
