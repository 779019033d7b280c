"""The service around the batches: health, key, request ids, documentation without a network, a bounded memory, a light import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
from live_api import LiveApi
from prometheus_client.parser import text_string_to_metric_families
from servers import RedisServer, free_port, wait_until
from sqlalchemy import update
from store_driver import execute

from headrace.broker import Broker
from headrace.settings import Settings
from headrace.store import Store
from headrace.store.tables import chunks, now, workers

ROOT = Path(__file__).resolve().parents[2]


def test_importing_the_api_loads_neither_torch_nor_a_database() -> None:
    code = (
        "import api.app, sys\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules and 'engine' not in sys.modules\n"
        "api.app.app\n"
        "assert 'torch' not in sys.modules\n"
    )
    nowhere = {
        **os.environ,
        "HEADRACE_DATABASE_URL": "sqlite:////nowhere/at/all.db",
        "HEADRACE_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_readiness_names_each_part(http: httpx.Client, store: Store, redis_server: RedisServer) -> None:
    assert http.get("/healthz").json()["status"] == "ok"

    def checks() -> tuple[int, dict[str, bool]]:
        response = http.get("/readyz")
        return response.status_code, {check["name"]: check["ok"] for check in response.json()["checks"]}

    assert checks() == (503, {"store": True, "redis": True, "worker:echo": False, "worker:org/other": False})
    store.register_worker("a@host", host="host", model="echo")
    store.register_worker("b@host", host="host", model="org/other")
    assert checks() == (200, {"store": True, "redis": True, "worker:echo": True, "worker:org/other": True})
    redis_server.stop()
    try:
        status, parts = checks()
        assert (status, parts["redis"], parts["store"]) == (503, False, True)
    finally:
        redis_server.start()
    assert checks()[0] == 200


def test_a_silent_worker_is_no_worker(settings: Settings, store: Store, broker: Broker) -> None:
    store.register_worker("a@host", host="host", model="echo")
    with LiveApi(replace(settings, models="echo", lease_s=1.0), store=store, broker=broker) as api, api.http() as http:
        wait_until(lambda: http.get("/readyz").status_code == 503, timeout_s=15)
        assert "stopped reporting" in http.get("/readyz").json()["checks"][2]["detail"]
        store.heartbeat("a@host")
        assert http.get("/readyz").status_code == 200


def test_a_worker_that_takes_no_chunks_is_not_ready(settings: Settings, store: Store, broker: Broker) -> None:
    """Its heartbeat is fresh: it comes from a thread of its own."""
    store.register_worker("a@host", host="host", model="echo")
    with LiveApi(replace(settings, models="echo"), store=store, broker=broker) as api, api.http() as http:
        assert http.post("/v1/batches", json={"prompts": ["a"] * 40}).status_code == 202
        assert http.get("/readyz").status_code == 200
        execute(store, update(chunks).values(sent_at=now() - 600))
        assert http.get("/readyz").status_code == 200, "it has just come"
        execute(store, update(workers).values(started_at=now() - 600))
        reply = http.get("/readyz")
        assert reply.status_code == 503
        assert "1 with a fresh heartbeat, but none takes chunks: 3 chunks wait in Redis, the oldest for 60" in reply.text
        assert "3 chunks wait" in reply.json()["checks"][1]["detail"]


def test_the_first_wrong_prompt_is_named_in_openais_form_too(http: httpx.Client) -> None:
    error = http.post("/v1/batches", json={"prompts": ["a", 5]}).json()["error"]
    assert (error["type"], error["code"], error["param"], error["index"]) == (
        "invalid_request_error",
        "invalid_request",
        "prompts",
        1,
    )
    assert error["errors"][0]["index"] == 1


def test_metrics(http: httpx.Client, store: Store, redis_server: RedisServer) -> None:
    def figures() -> dict[tuple[str, ...], float]:
        reply = http.get("/metrics")
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/plain; version=")
        families = list(text_string_to_metric_families(reply.text))
        assert len({family.name for family in families}) == len(families)
        # Labels stand by name: the model before the worker.
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    assert figures()["headrace_redis_messages", "echo"] == 0
    created = http.post("/v1/batches", json={"prompts": ["secret"] * 40, "completion_window": "1h"})
    engine = {"running": 5, "generated_tokens": 700, "is_alive": True}
    store.register_worker("gpu1@host", host="host", model="echo", stats={"rows_recorded": 12, "engine": engine, "pid": 1})
    store.register_worker("new@host", host="host", model="echo")
    for name, age_s in (("killed@host", 600), ("killed-long-ago@host", 86_400)):
        store.register_worker(name, host="host", model="echo", stats={"chunks_in_flight": 7})
        execute(store, update(workers).where(workers.c.id == name).values(heartbeat_at=now() - age_s))
    found = figures()
    assert found["headrace_open_batches", "echo", "in_progress"] == 1
    assert found["headrace_open_prompts", "echo"] == 40
    assert (found["headrace_chunks", "echo", "sent"], found["headrace_redis_messages", "echo"]) == (3, 3)
    assert 3_500 < found["headrace_next_deadline_seconds", "echo"] <= 3_600
    assert found["headrace_worker_rows_recorded_total", "echo", "gpu1@host"] == 12
    assert found["headrace_engine_generated_tokens_total", "echo", "gpu1@host"] == 700
    assert found["headrace_engine_running", "echo", "gpu1@host"] == 5
    assert found["headrace_worker_heartbeat_age_seconds", "echo", "new@host"] < 60
    assert found["headrace_worker_heartbeat_age_seconds", "echo", "killed@host"] > 590
    assert ("headrace_worker_chunks_in_flight", "echo", "killed@host") not in found, "nobody holds them"
    assert "killed-long-ago" not in http.get("/metrics").text
    assert "secret" not in http.get("/metrics").text
    assert created.json()["id"] not in http.get("/metrics").text
    redis_server.stop()
    try:
        without = figures()
        assert ("headrace_redis_messages", "echo") not in without
        assert without["headrace_open_prompts", "echo"] == 40
    finally:
        redis_server.start()


def test_windows_and_files_end_though_no_worker_runs(api: LiveApi, http: httpx.Client, store: Store) -> None:
    """And the place of a batch that is over is free again."""
    created = http.post("/v1/batches", json={"prompts": ["a", "b"], "completion_window": "1s"})
    file_id = store.files.begin(filename="a.jsonl", purpose="batch")
    store.files.append(file_id, 0, b"{}")
    store.files.complete(file_id, size=2, lines=1, parts=1, expires_in_s=1.0)
    path = f"/v1/batches/{created.json()['id']}"
    wait_until(lambda: http.get(path).json()["status"] == "expired", timeout_s=15)
    rows = http.get(f"{path}/results").json()["data"]
    assert [row["error"]["code"] for row in rows] == ["batch_expired"] * 2
    wait_until(lambda: http.get(f"/v1/files/{file_id}").status_code == 404, timeout_s=15)


def test_with_a_key_everything_under_v1_needs_it(
    settings: Settings, store: Store, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with LiveApi(replace(settings, api_key="s3cret-käy"), store=store, broker=broker) as api, api.http() as http:
        paths = [path for path in http.get("/openapi.json").json()["paths"] if path.startswith("/v1")]
        assert len(paths) >= 7
        for path in paths:
            for token in (None, "Bearer wrong", "Bearer", "Basic s3cret", b"Bearer s3cret-k\xff"):
                method = "POST" if path.endswith(("/cancel", "/retry")) else "GET"
                response = http.request(method, path, headers={"authorization": token} if token else {})
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["code"] == "invalid_api_key"
        good = {"authorization": "Bearer s3cret-käy".encode()}
        assert http.get("/v1/batches", headers=good).status_code == 200
        assert http.post("/v1/batches", json={"prompts": ["a"]}, headers=good).status_code == 202
        assert http.post("/v1/batches", content=b"[", headers={"content-type": "application/json"}).status_code == 401
        assert http.get("/healthz").status_code == 200
    assert "s3cret" not in caplog.text


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    for path in ("/healthz", "/v1/batches", "/v1/none", "/docs"):
        assert re.fullmatch(r"req_[0-9a-f]{32}", http.get(path).headers["x-request-id"])
    assert http.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/healthz", headers={"x-request-id": "a b<script>"}).headers["x-request-id"].startswith("req_")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if tag == "a" else []
        self.loaded += [str(found)] if tag in ("script", "link", "img", "iframe") or "src" in found else []
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_documentation_needs_no_network(http: httpx.Client) -> None:
    response = http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = _Page()
    page.feed(response.text)
    assert page.open == []
    assert page.loaded == []
    assert "url(" not in response.text
    assert "@import" not in response.text
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if not link.startswith("#")} == {"/openapi.json"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    # The type of every problem leads to its line on the page.
    problem = http.get("/v1/batches/x").json()
    assert problem["type"].removeprefix("/docs#") in page.ids
    assert http.get("/").headers["location"] == "/docs"
    # A method is written in white: without a colour behind it nobody reads it.
    methods = {method for path in http.get("/openapi.json").json()["paths"].values() for method in path}
    assert [method for method in methods if f".method.{method} {{ background:" not in response.text] == []


def test_every_operation_has_an_example_that_fits_its_schema(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len(operations) == 18
    checked = 0
    for operation in operations:
        assert operation["summary"]
        assert operation["description"]
        assert "HTTPValidationError" not in json.dumps(operation)
        examples = [
            (content["schema"], content["example"])
            for status, response in operation["responses"].items()
            if status.startswith("2")
            for kind, content in response.get("content", {}).items()  # a 204 has none
            if kind == "application/json"
        ]
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        examples += [(body["schema"], entry["value"]) for entry in body["examples"].values()] if body else []
        for schema, example in examples:
            rooted = {**schema, "components": document["components"]}
            jsonschema.Draft202012Validator(rooted).validate(example)
            checked += 1
    assert checked >= 16


def test_the_examples_are_accepted_as_they_stand(http: httpx.Client) -> None:
    """But for the file's id, which is another for each file."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    form = {"data": {"purpose": "batch"}, "files": {"file": ("requests.jsonl", json.dumps(line).encode())}}
    file_id = http.post("/v1/files", **form).json()["id"]
    operation = http.get("/openapi.json").json()["paths"]["/v1/batches"]["post"]
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        body: dict[str, Any] = example["value"]
        body.pop("model", None)
        if "input_file_id" in body:
            assert http.post("/v1/batches", json={**body, "input_file_id": file_id}).status_code == 200
            continue
        assert http.post("/v1/batches", json=body).status_code == 202


def test_a_wrong_setting_is_named_without_a_traceback() -> None:
    environment = {**os.environ, "HEADRACE_CHUNK_SIZE": "many"}
    command = [sys.executable, "-m", "uvicorn", "api.app:app", "--port", str(free_port())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("this API can't start: HEADRACE_CHUNK_SIZE='many'")
    assert "Traceback" not in done.stderr


def test_large_batches_leave_no_memory_behind(settings: Settings, tmp_path: Path) -> None:
    """Uvicorn in its own process by the command of the README; five batches of 20,000 prompts each."""
    settings = replace(settings, database_url=f"sqlite:///{tmp_path}/large.db")
    Store(settings.database_url, create=True).close()
    port = free_port()
    environment = {**os.environ, **settings.to_environ()}
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "api.app:app",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    server = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        body = json.dumps({"prompts": [f"prompt {i}: " + "lorem ipsum " * 25 for i in range(20_000)]}).encode()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:

            def is_up() -> bool:
                try:
                    return http.get("/healthz").status_code == 200
                except httpx.TransportError:
                    return False

            def submit() -> float:
                response = http.post("/v1/batches", content=body, headers={"content-type": "application/json"})
                assert response.status_code == 202
                assert response.json()["request_counts"]["total"] == 20_000
                return psutil.Process(server.pid).memory_info().rss / 2**20

            wait_until(is_up)
            idle = psutil.Process(server.pid).memory_info().rss / 2**20
            after = [submit() for _ in range(5)]
        assert after[-1] - after[1] < 10, f"MiB after each batch: {after}"
        assert max(after) - idle < 12 * len(body) / 2**20, (
            f"{max(after) - idle:.0f} MiB for bodies of {len(body) / 2**20:.0f} MiB"
        )
    finally:
        server.terminate()
        server.wait(20)
