"""API keys over HTTP: who may come in, who sees what, and what a key's limits say. The database and the server are real."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from live_api import LiveApi, work
from servers import RedisServer, wait_until

from api import services
from headrace.broker import Broker
from headrace.settings import Settings
from headrace.store import Role, Store


@pytest.fixture
def keyed_store(settings: Settings, tmp_path: Any) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path}/keys.db", create=True) as store:
        yield store


@pytest.fixture
def live(settings: Settings, keyed_store: Store, broker: Broker, redis_server: RedisServer) -> Iterator[LiveApi]:
    redis_server.flush()
    with LiveApi(replace(settings, api_key="the operator's"), store=keyed_store, broker=broker) as live:
        yield live


def caller(live: LiveApi, key: str) -> httpx.Client:
    return live.http(headers={"authorization": f"Bearer {key}"})


def send(http: httpx.Client, count: int = 2, **headers: str) -> httpx.Response:
    return http.post("/v1/batches", json={"prompts": ["hello"] * count, "model": "echo"}, headers=headers)


def test_a_refusal_says_what_openai_says(live: LiveApi) -> None:
    with live.http() as http:
        none, wrong = http.get("/v1/batches"), http.get("/v1/batches", headers={"authorization": "Bearer hr_wrong"})
    for reply, words in ((none, "You didn't provide an API key"), (wrong, "Incorrect API key provided")):
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["code"] == "invalid_api_key"
        assert reply.json()["detail"].startswith(words)
        assert "hr_wrong" not in reply.text


def test_the_first_key_shuts_the_door(
    settings: Settings, keyed_store: Store, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "KEYS_SEEN_S", 0.0)
    with LiveApi(settings, store=keyed_store, broker=broker) as live, live.http() as http:
        assert http.get("/v1/batches").status_code == 200
        assert http.get("/v1/batches", headers={"authorization": "Bearer anything"}).status_code == 200
        made = keyed_store.keys.create("one")
        assert http.get("/v1/batches").status_code == 401
        with caller(live, made.text) as mine:
            assert mine.get("/v1/batches").status_code == 200
            keyed_store.keys.revoke("one")
            assert mine.get("/v1/batches").status_code == 401
        assert http.get("/v1/batches").status_code == 401
        for path in ("/healthz", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200


def test_a_key_sees_its_own_batches_and_nothing_of_others(live: LiveApi, keyed_store: Store) -> None:
    keys = [keyed_store.keys.create(name).text for name in ("one", "two")]
    with caller(live, keys[0]) as one, caller(live, keys[1]) as two, caller(live, "the operator's") as operator:
        mine, other = send(one).json()["id"], send(two).json()["id"]
        work(keyed_store, failing=[0])
        unknown = f"batch_{uuid.uuid4().hex}"
        operations = [
            ("GET", ""), ("POST", "/cancel"), ("POST", "/retry"), ("DELETE", ""), ("GET", "/results"), ("GET", "/results.jsonl"),
        ]  # fmt: skip
        for method, path in operations:
            theirs, nobodys = (one.request(method, f"/v1/batches/{batch_id}{path}") for batch_id in (other, unknown))
            assert theirs.status_code == nobodys.status_code == 404, path
            same = [{**reply.json(), "instance": "", "request_id": ""} for reply in (theirs, nobodys)]
            assert str(same[0]).replace(other, unknown) == str(same[1]), "the two can't be told apart"
        assert [batch["id"] for batch in one.get("/v1/batches").json()["data"]] == [mine]
        assert one.get("/v1/batches", params={"after": other}).status_code == 404
        assert {batch["id"] for batch in operator.get("/v1/batches").json()["data"]} == {mine, other}
        assert operator.get(f"/v1/batches/{other}").status_code == 200
        assert two.get(f"/v1/batches/{other}").json()["status"] == "completed"
        again = one.post(f"/v1/batches/{mine}/retry")
        assert again.status_code == 202
        assert one.get(f"/v1/batches/{again.json()['id']}").status_code == 200
        assert one.get(f"/v1/batches/{mine}/results").json()["data"][1]["choices"]
        assert one.post(f"/v1/batches/{again.json()['id']}/cancel").status_code == 200
        assert one.delete(f"/v1/batches/{mine}").status_code == 204
        theirs_again = operator.post(f"/v1/batches/{other}/retry").json()["id"]
        assert two.get(f"/v1/batches/{theirs_again}").status_code == 200, "what the operator retries stays its owner's"


def test_a_key_sees_its_own_files_and_nothing_of_others(live: LiveApi, keyed_store: Store) -> None:
    keys = [keyed_store.keys.create(name, max_active_prompts=3).text for name in ("one", "two")]

    def upload(http: httpx.Client, count: int) -> str:
        line = '{"custom_id": "%d", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "echo", "messages": [%s]}}\n'
        text = "".join(line % (number, '{"role": "user", "content": "hello"}') for number in range(count))
        reply = http.post("/v1/files", files={"file": ("in.jsonl", text.encode())}, data={"purpose": "batch"})
        assert reply.status_code == 200, reply.text
        return reply.json()["id"]

    def start(http: httpx.Client, file_id: str) -> httpx.Response:
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return http.post("/v1/batches", json=body)

    with caller(live, keys[0]) as one, caller(live, keys[1]) as two, caller(live, "the operator's") as operator:
        mine, theirs = upload(one, 2), upload(two, 2)
        unknown = f"file-{uuid.uuid4().hex}"
        batch_id = start(two, theirs).json()["id"]
        wait_until(lambda: two.get(f"/v1/batches/{batch_id}").json()["status"] == "in_progress", timeout_s=20)
        work(keyed_store)
        output = two.get(f"/v1/batches/{batch_id}").json()["output_file_id"]
        assert two.get(f"/v1/files/{output}/content").status_code == 200
        for file_id, nobodys in ((theirs, unknown), (output, output.replace(output[5:37], uuid.uuid4().hex))):
            for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
                replies = [one.request(method, f"/v1/files/{name}{path}") for name in (file_id, nobodys)]
                assert [reply.status_code for reply in replies] == [404, 404], (method, path)
                same = [{**reply.json(), "instance": "", "request_id": ""} for reply in replies]
                assert str(same[0]).replace(file_id, nobodys) == str(same[1])
        refused = [start(one, name) for name in (theirs, unknown)]
        assert refused[0].status_code == refused[1].status_code >= 400
        assert [file["id"] for file in one.get("/v1/files").json()["data"]] == [mine]
        assert theirs in {file["id"] for file in operator.get("/v1/files").json()["data"]}
        assert start(one, mine).status_code in (200, 202)
        full = start(one, mine)
        assert (full.status_code, full.json()["code"]) == (429, "quota_exceeded"), "a file's lines count when its batch is made"
        assert start(one, upload(one, 4)).status_code == 400


def test_an_admin_key_sees_everybodys_batches(live: LiveApi, keyed_store: Store) -> None:
    admin = keyed_store.keys.create("admin", role=Role.ADMIN).text
    user = keyed_store.keys.create("user").text
    with caller(live, admin) as boss, caller(live, user) as one:
        batch_id = send(one).json()["id"]
        assert boss.get(f"/v1/batches/{batch_id}").status_code == 200
        own = send(boss).json()["id"]
        assert one.get(f"/v1/batches/{own}").status_code == 404


def test_a_limit_is_named_and_says_when_to_come_back(live: LiveApi, keyed_store: Store) -> None:
    key = keyed_store.keys.create("one", max_active_prompts=3, max_active_batches=2).text
    with caller(live, key) as http:
        assert send(http, 2, **{"idempotency-key": "k"}).status_code == 202
        full = send(http, 2)
        assert (full.status_code, full.json()["code"]) == (429, "quota_exceeded")
        assert "max_active_prompts" in full.json()["detail"]
        assert int(full.headers["retry-after"]) >= 1
        assert send(http, 4).status_code == 422, "it would never fit"
        assert send(http, 2, **{"idempotency-key": "k"}).status_code == 202, "what is repeated is not counted again"
        assert send(http, 1).status_code == 202
        third = send(http, 1)
        assert third.status_code == 429
        assert "max_active_batches" in third.json()["detail"]
        work(keyed_store)
        assert send(http, 2).status_code == 202
        assert len(http.get("/v1/batches").json()["data"]) == 3


def test_a_priority_above_the_keys_is_refused_of_prompts_and_of_files(live: LiveApi, keyed_store: Store) -> None:
    key = keyed_store.keys.create("one", max_priority=1).text
    with caller(live, key) as http:
        stored = http.post("/v1/files", files={"file": ("a.jsonl", b'{"prompt": "a"}\n')}, data={"purpose": "batch"}).json()[
            "id"
        ]
        for content, status in (({"prompts": ["a"]}, 422), ({"input_file_id": stored}, 400)):
            assert http.post("/v1/batches", json={**content, "priority": 1}).is_success
            refused = http.post("/v1/batches", json={**content, "priority": 2})
            assert (refused.status_code, refused.json()["param"]) == (status, "priority")
        assert len(http.get("/v1/batches").json()["data"]) == 2


def test_requests_at_once_never_pass_a_limit(live: LiveApi, keyed_store: Store) -> None:
    key = keyed_store.keys.create("one", max_active_prompts=7).text
    with caller(live, key) as http, ThreadPoolExecutor(16) as pool:
        statuses = sorted(reply.status_code for reply in pool.map(lambda _: send(http, 2), range(32)))
    assert statuses == [202] * 3 + [429] * 29


def test_a_database_without_room_takes_no_more(settings: Settings, keyed_store: Store, broker: Broker) -> None:
    for full in ({"max_database_bytes": 1000.0}, {"min_free_bytes": 2**62}):
        with LiveApi(replace(settings, **full), store=keyed_store, broker=broker) as live, live.http() as http:
            reply = send(http)
            assert (reply.status_code, reply.json()["code"]) == (507, "storage_full")
            assert int(reply.headers["retry-after"]) >= 1
            assert http.get("/v1/batches").json()["data"] == []


def test_headers_have_a_bound(live: LiveApi) -> None:
    with caller(live, "the operator's") as http:
        assert http.get("/v1/batches", headers={"x-much": "a" * 30_000}).status_code == 200
        for much in ({"x-much": "a" * 40_000}, {f"x-{n}": "a" * 100 for n in range(400)}):
            reply = http.get("/v1/batches", headers=much)
            assert (reply.status_code, reply.json()["code"]) == (431, "headers_too_large")
        assert http.get("/healthz").status_code == 200


def test_no_key_is_in_any_log_line(live: LiveApi, keyed_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    key = keyed_store.keys.create("one").text
    with caller(live, key) as http, caller(live, "hr_wrong-and-secret") as stranger:
        send(http)
        http.get("/v1/batches/none")
        http.post("/v1/batches", content=b"{")
        stranger.get("/v1/batches")
    told = caplog.text + "".join(repr(record.__dict__) for record in caplog.records)
    assert "key_refused" in told
    for secret in (key, key[9:], "hr_wrong-and-secret", "the operator's"):
        assert secret not in told
