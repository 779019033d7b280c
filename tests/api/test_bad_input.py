"""What can be wrong with a request: each is a problem that names it, nothing is stored, and the service goes on."""

from __future__ import annotations

import dataclasses
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_api import LiveApi
from servers import PostgresServer
from sqlalchemy import event

from headrace.broker import Broker
from headrace.settings import Settings
from headrace.store import Store

GOOD = {"prompts": ["a"]}
MODEL_GONE = "model_not_found"
# body, status, code, (field, index) of the first entry in `errors` or else `param`
BODIES: dict[str, tuple[Any, int, str, str | None, int | None]] = {
    "unknown model": ({**GOOD, "model": "gpt-9"}, 404, MODEL_GONE, "model", None),
    "model of a wrong type": ({**GOOD, "model": 5}, 422, "invalid_request", "model", None),
    "no prompts": ({}, 422, "invalid_request", "prompts", None),
    "empty list": ({"prompts": []}, 422, "invalid_request", "prompts", None),
    "prompts no list": ({"prompts": "a"}, 422, "invalid_request", "prompts", None),
    "prompts null": ({"prompts": None}, 422, "invalid_request", "prompts", None),
    "a number as prompt": ({"prompts": ["a", "b", 5]}, 422, "invalid_request", "prompts", 2),
    "null as prompt": ({"prompts": [None]}, 422, "invalid_request", "prompts", 0),
    "an object as prompt": ({"prompts": ["a", {"role": "user", "content": "x"}]}, 422, "invalid_request", "prompts", 1),
    "texts in a conversation": ({"prompts": [["a", "b"]]}, 422, "invalid_request", "prompts", 0),
    "too many prompts": ({"prompts": ["a"] * 30_001}, 422, "invalid_request", "prompts", None),
    "unknown field": ({**GOOD, "temprature": 1}, 422, "invalid_request", "temprature", None),
    "both prompts and a file": ({"input_file_id": "file-1", **GOOD}, 400, "invalid_request", "input_file_id", None),
    "a file that isn't there": ({"input_file_id": "file-1"}, 404, "not_found", "input_file_id", None),
    "a file's id of characters": ({"input_file_id": "\0\n'"}, 404, "not_found", "input_file_id", None),
    "a file's id of a wrong type": ({"input_file_id": 5}, 400, "invalid_request", "input_file_id", None),
    "an endpoint beside prompts": ({**GOOD, "endpoint": "/v1/completions"}, 422, "invalid_request", "endpoint", None),
    "an endpoint that isn't served": (
        {"input_file_id": "file-1", "endpoint": "/v1/embeddings"},
        400,
        "invalid_request",
        "endpoint",
        None,
    ),
    "a config beside lines with their own": (
        {"input_file_id": "file-1", "endpoint": "/v1/completions", "gen_config": {}},
        400,
        "invalid_request",
        "gen_config",
        None,
    ),
    "unknown gen_config field": ({**GOOD, "gen_config": {"beams": 4}}, 422, "invalid_request", "gen_config.beams", None),
    "gen_config out of range": ({**GOOD, "gen_config": {"top_p": 2}}, 422, "invalid_request", "gen_config.top_p", None),
    "gen_config at odds with itself": (
        {**GOOD, "gen_config": {"min_new_tokens": 9, "max_new_tokens": 8}},
        422,
        "invalid_request",
        "gen_config.min_new_tokens",
        None,
    ),
    "gen_config of a wrong type": ({**GOOD, "gen_config": {"n": "3"}}, 422, "invalid_request", "gen_config.n", None),
    "gen_config no object": ({**GOOD, "gen_config": [1]}, 422, "invalid_request", "gen_config", None),
    "priority as text": ({**GOOD, "priority": "1"}, 422, "invalid_request", "priority", None),
    "priority too high": ({**GOOD, "priority": 1001}, 422, "invalid_request", "priority", None),
    "window of words": ({**GOOD, "completion_window": "soon"}, 422, "invalid_request", "completion_window", None),
    "metadata value no text": ({**GOOD, "metadata": {"a": 1}}, 422, "invalid_request", "metadata.a", None),
    "metadata key too long": ({**GOOD, "metadata": {"k" * 65: "v"}}, 422, "invalid_request", None, None),
    "too much metadata": ({**GOOD, "metadata": {str(i): "v" for i in range(17)}}, 422, "invalid_request", "metadata", None),
    "a list": ([GOOD], 422, "invalid_request", None, None),
    "not JSON": (b'{"prompts": ["a"', 422, "invalid_request", None, None),
    "nothing": (b"", 422, "invalid_request", None, None),
    "not UTF-8": (b'{"prompts": ["\xff\xfe"]}', 422, "invalid_request", None, None),
    "half a surrogate pair": (b'{"prompts": ["\\ud800"]}', 422, "invalid_request", None, None),
    "nested without end": (b'{"prompts": [' + b"[" * 5000 + b"]" * 5000 + b"]}", 422, "invalid_request", None, None),
    "NaN": (b'{"prompts": ["a"], "gen_config": {"temperature": NaN}}', 422, "invalid_request", "gen_config.temperature", None),
}


def post(http: httpx.Client, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post("/v1/batches", content=content, headers={"content-type": "application/json", **headers})


def check_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["detail"]
    assert problem["title"]
    assert problem["type"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return problem


@pytest.fixture
def unharmed(http: httpx.Client) -> Iterator[httpx.Client]:
    """A client; afterwards nothing may have been stored, and a good request must still be taken."""
    yield http
    assert http.get("/v1/batches").json()["data"] == []
    assert post(http, GOOD).status_code == 202


def test_each_bad_body_is_refused_by_name(unharmed: httpx.Client) -> None:
    for name, (body, status, code, field, index) in BODIES.items():
        problem = check_problem(post(unharmed, body), status, code)
        first = (problem.get("errors") or [{}])[0]
        assert first.get("field", problem.get("param")) == field or (field is None and name == "metadata key too long"), name
        assert first.get("index", problem.get("index")) == index, name
        assert "pattern" not in problem["detail"], name


def test_each_bad_body_is_refused_by_name_on_postgres_too(
    settings: Settings, broker: Broker, postgres_server: PostgresServer
) -> None:
    """Its texts have no NUL: one in an id is no id, and not our bug."""
    with (
        postgres_server.database() as url,
        Store(url, create=True) as store,
        LiveApi(settings, store=store, broker=broker) as api,
        api.http() as http,
    ):
        for body, status, code, _, _ in BODIES.values():
            check_problem(post(http, body), status, code)
        for endpoint in ("/v1/batches", "/v1/chat/completions"):
            for file_id in ("\0", "file-" + "0" * 31 + "\0", "x" * 64):
                check_problem(post(http, {"input_file_id": file_id, "endpoint": endpoint}), 404, "not_found")
        assert post(http, {"prompts": ["\0"], "metadata": {"\0": "\0"}}).status_code == 202


def test_messages_help(http: httpx.Client) -> None:
    assert "echo, org/other" in post(http, {**GOOD, "model": "x"}).json()["detail"]
    assert "max_new_tokens" in post(http, {**GOOD, "gen_config": {"beams": 1}}).json()["detail"]
    assert "30,000" in post(http, {"prompts": ["a"] * 30_001}).json()["detail"]
    assert "no such field" in post(http, {**GOOD, "x": 1}).json()["detail"]


def test_every_wrong_prompt_is_named_up_to_a_hundred(unharmed: httpx.Client) -> None:
    prompts = [i if i % 2 else f"p{i}" for i in range(600)]
    problem = check_problem(post(unharmed, {"prompts": prompts}), 422, "invalid_request")
    assert [entry["index"] for entry in problem["errors"]] == list(range(1, 201, 2))
    assert "and 299 more" in problem["detail"]


def test_a_prompt_never_appears_in_an_error(unharmed: httpx.Client) -> None:
    response = post(unharmed, {"prompts": ["my-secret", 7], "metadata": {"a": ["my-secret"]}})
    assert response.status_code == 422
    assert "my-secret" not in response.text


def test_another_content_type_is_refused(unharmed: httpx.Client) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = unharmed.post("/v1/batches", content=json.dumps(GOOD), headers={"content-type": content_type})
        check_problem(response, 415, "unsupported_media_type")


def test_a_compressed_body_is_refused(unharmed: httpx.Client) -> None:
    check_problem(post(unharmed, GOOD, **{"content-encoding": "gzip"}), 415, "unsupported_media_type")
    assert post(unharmed, b"[", **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 422


def test_paths_and_methods_that_are_not_there(http: httpx.Client) -> None:
    check_problem(http.get("/v1/nothing"), 404, "not_found")
    check_problem(http.get("/v1/models/nothing"), 404, MODEL_GONE)
    response = http.delete("/v1/batches")
    check_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"]


def test_a_huge_body_is_refused_before_it_is_read(api: LiveApi, unharmed: httpx.Client) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        # Not one byte of the body is ever sent: the answer must come all the same.
        link.sendall(
            b"POST /v1/batches HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n"
        )
        reply = link.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"payload_too_large" in reply
    assert b"HEADRACE_MAX_BODY_BYTES" in reply
    assert b"connection: close" in reply.lower()
    assert unharmed.get("/healthz").status_code == 200


def test_a_huge_body_of_unknown_length_is_cut_off(api: LiveApi, unharmed: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"prompts": ["'
        for _ in range(2000):
            sent += 1 << 20
            yield b"x" * (1 << 20)

    with api.http() as http:
        check_problem(
            http.post("/v1/batches", content=endless(), headers={"content-type": "application/json"}), 413, "payload_too_large"
        )
    assert sent < 200 << 20, "the server went on reading"
    assert unharmed.get("/healthz").status_code == 200


def test_a_sender_that_leaves_in_the_middle_stores_nothing(api: LiveApi, unharmed: httpx.Client) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        link.sendall(
            b'POST /v1/batches HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"prompts": ["a"]}'
        )
    assert unharmed.get("/healthz").status_code == 200


def _malform(rng: random.Random) -> bytes:
    """Return a body that is wrong in one random way; the rest of it is fine."""
    junk = rng.choice([None, True, False, 0, -1, 1.5, 10**30, "", "x", [], {}, [[]], {"a": 1}, ["a"], [1]])
    body: dict[str, Any] = {
        "prompts": ["a", [{"role": "user", "content": "b"}]],
        "gen_config": {"n": 2},
        "metadata": {"k": "v"},
    }
    way = rng.randrange(7)
    if way == 0:
        text = json.dumps(body).encode()
        return text[: rng.randrange(len(text))]
    if way == 1:
        text = bytearray(json.dumps(body).encode())
        text[rng.randrange(len(text))] = rng.choice(b"\x00\x01\xff\xfe\x80")
        return bytes(text)
    if way == 2:
        name = rng.choice(["promts", "PROMPTS", "stream", "", "n", "\x00", "input_file_id"])
        body[name] = "file-1" if name == "input_file_id" else junk  # null would be as good as none
    elif way == 3:
        body["prompts"].insert(
            rng.randrange(3), rng.choice([None, True, 0, 1.5, 10**30, {}, {"a": 1}, [1], [None], [[]], ["a"]])
        )
    elif way == 4:
        field = rng.choice(
            ["temperature", "top_k", "n", "max_new_tokens", "stop_words", "logit_bias", "random_seed", "logprobs"]
        )
        body["gen_config"][field] = rng.choice(
            ["x" if field != "stop_words" else 5, {"a": {}}, [[]], -7, True, [None], 10**400, [{}]]
        )
    elif way == 6:
        body = {"input_file_id": "file-" + "0" * 32, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        body[rng.choice([*body, "prompts", "gen_config", "output_expires_after", "x"])] = junk
    else:
        field, bad = rng.choice(
            [("prompts", [None, 5, "x", {}, [], True]), ("gen_config", [5, "x", [], True]), ("metadata", [5, "x", [], {"": "v"}, {"a": None}]),
             ("priority", [None, "x", 1.5, True, 10**30, []]), ("completion_window", [None, 5, "", "24", "0h", "24h\n", "-1h", []]),
             ("model", [5, [], {}, True, "", "x", "echo\x00"])]
        )  # fmt: skip
        body[field] = rng.choice(bad)
    return json.dumps(body).encode()


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_bodies_are_refused_and_nothing_of_them_is_stored(unharmed: httpx.Client, count: int) -> None:
    rng = random.Random(20260101)
    statuses = set()
    for number in range(count):
        body = _malform(rng)
        response = post(unharmed, body)
        assert 400 <= response.status_code < 500, (number, body[:300], response.text[:300])
        assert response.headers["content-type"] == "application/problem+json"
        statuses.add(response.status_code)
    assert statuses == {400, 404, 422}, "400: OpenAI's form"


def test_a_full_disk_is_said_and_survived(settings: Settings, broker: Broker, tmp_path: Path) -> None:
    """SQLite's own SQLITE_FULL, by a bound on its pages: what it reports when the disk has no more."""
    limit = [2**30]
    store = Store(f"sqlite:///{tmp_path}/small.db", create=True)
    event.listen(store._database.writer, "checkout", lambda link, *_: link.execute(f"PRAGMA max_page_count={limit[0]}").close())
    with store, LiveApi(settings, store=store, broker=broker) as api, api.http() as http:
        before = post(http, GOOD).json()["id"]
        limit[0] = 60
        problem = check_problem(post(http, {"prompts": ["x" * 500_000] * 4}), 507, "storage_full")
        assert "disk is full" in problem["detail"]
        assert str(store._database.url.database) not in json.dumps(problem), "no path of the server in an answer"
        assert http.get(f"/v1/batches/{before}").status_code == 200, "reading goes on"
        limit[0] = 2**30
        assert post(http, {"prompts": ["x" * 500_000] * 4}).status_code == 202
        states = [batch["status"] for batch in http.get("/v1/batches").json()["data"]]
        assert states.count("in_progress") == 2


def test_a_database_that_goes_away_and_comes_back(settings: Settings, broker: Broker, postgres_server: PostgresServer) -> None:
    with (
        postgres_server.database() as url,
        Store(url, create=True) as store,
        LiveApi(settings, store=store, broker=broker) as api,
        api.http() as http,
    ):
        batch_id = post(http, GOOD).json()["id"]
        postgres_server.kill9()
        for response in (post(http, GOOD), http.get(f"/v1/batches/{batch_id}"), http.get("/v1/batches")):
            problem = check_problem(response, 503, "store_unavailable")
            assert response.headers["retry-after"] == "5"
            assert "127.0.0.1" not in json.dumps(problem), "no address of the server in an answer"
        assert http.get("/healthz").status_code == 200, "the process lives"
        postgres_server.start()
        assert http.get(f"/v1/batches/{batch_id}").json()["id"] == batch_id
        assert post(http, GOOD).status_code == 202


def test_a_service_that_starts_before_its_database(settings: Settings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, database_url=f"sqlite:///{tmp_path}/late.db")
    with LiveApi(settings) as api, api.http() as http:
        check_problem(post(http, GOOD), 503, "store_unavailable")
        with Store(settings.database_url, create=True):
            assert post(http, GOOD).status_code == 202


def test_our_own_bug_is_a_500_without_insides(settings: Settings, broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"entrails: {name}")

    with LiveApi(settings, store=Broken(), broker=broker) as api, api.http() as http:
        response = http.get("/v1/batches", headers={"x-request-id": "trace-7"})
        problem = check_problem(response, 500, "internal_error")
        assert "entrails" not in response.text
        assert problem["request_id"] == "trace-7"
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "request_crashed"]
    assert (record.request_id, record.exc_info[0]) == ("trace-7", RuntimeError)
