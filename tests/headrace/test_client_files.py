"""Files through headrace's own client and command line, against a real server: uploaded in pieces, answered, and written in order."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_api import LiveApi, work
from servers import RedisServer, wait_until

from headrace.batch import CHAT, ROWS, TEXT, BatchStatus
from headrace.broker import Broker, make_celery
from headrace.cli import main
from headrace.cli.batch_files import LARGE_BYTES, endpoint_of
from headrace.client import Client
from headrace.config import GenerationConfig
from headrace.errors import InvalidRequest, NotFound, ServiceUnavailable
from headrace.settings import Settings, get_settings
from headrace.store import Store


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path}/headrace.db", create=True) as store:
        yield store


@pytest.fixture
def api(redis: RedisServer, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LiveApi]:
    redis.flush()
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    settings = Settings(model="echo", redis_url=redis.url, chunk_size=8, reconcile_interval_s=0.3)
    broker = Broker(make_celery(settings))
    with LiveApi(settings, store=store, broker=broker) as live:
        yield live
    broker.close()


@pytest.fixture
def worked(store: Store) -> Iterator[None]:
    """While the test runs, somebody answers what is there; the prompt at index 2 fails."""
    stop = threading.Event()
    errors: list[Exception] = []

    def run() -> None:
        while not stop.wait(0.05):
            try:
                work(store, failing=[2])
            except Exception as error:
                # A thread that ends here leaves a test that waits for its batch for ever, and says nothing of why.
                errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()
    if errors:
        raise errors[0]


def openai_line(number: int, **changes: Any) -> str:
    body = {"messages": [{"role": "user", "content": f"q{number}"}], "max_tokens": number + 1}
    return json.dumps({"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body, **changes})


def test_a_file_is_submitted_and_told_as_it_goes(api: LiveApi, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i} " + "x" * 2000}) + "\n" for i in range(1000)))
    told: list[int] = []
    with Client(api.url) as client:
        batch = client.submit_file(
            path, GenerationConfig(max_new_tokens=5), metadata={"a": "b"}, priority=2, on_progress=told.append
        )
        assert (batch.endpoint, batch.priority, batch.metadata) == (ROWS, 2, {"a": "b"})
        assert batch.input_file_id is not None
        assert told == sorted(told)
        assert told[-1] == path.stat().st_size
        assert len(told) > 10, "it is read while it is sent"
        seen = list(client.file_content(batch.input_file_id))
        assert seen == path.read_text().splitlines()
        wait_until(lambda: client.get(batch.id).status is not BatchStatus.VALIDATING, timeout_s=60)
        assert client.get(batch.id).counts.total == 1000
        assert store.files.get(batch.input_file_id).expires_at is not None
        again = client.submit_file(path, idempotency_key="k")
        assert client.submit_file(path, idempotency_key="k").id == again.id, "the same content, sent again under one key"
        with pytest.raises(NotFound):
            list(client.file_content("file-" + "0" * 32))


def test_an_upload_whose_connection_breaks_is_begun_again(api: LiveApi, store: Store, tmp_path: Path) -> None:
    class Breaks(httpx.HTTPTransport):
        sent = 0

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            self.sent += 1
            if self.sent == 1:
                next(iter(request.stream))  # type: ignore[call-overload]  # it is a stream of bytes
                raise httpx.WriteError("cut", request=request)
            return super().handle_request(request)

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'"text"\n' * 100_000)
    with Client(api.url, transport=Breaks()) as client:
        assert store.files.get(client.upload(path)).bytes == path.stat().st_size
    with Client("http://127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(ServiceUnavailable):
            client.upload(path)
        with pytest.raises(ServiceUnavailable):
            list(client.file_content("file-" + "0" * 32))


@pytest.mark.usefixtures("worked")
def test_the_command_line_sends_openais_format_and_writes_its_lines(
    api: LiveApi, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(openai_line(number) for number in range(5)))
    assert main(["submit", str(source), "--url", api.url, "--wait", "-o", str(output), "--json"]) == 0
    shown = capsys.readouterr()
    # Of a file this small nothing could be seen but "0/0 MiB".
    assert "uploading" not in shown.err
    batch = json.loads(shown.out)
    assert (batch["status"], batch["endpoint"], batch["request_counts"]) == (
        "completed",
        CHAT,
        {"total": 5, "completed": 4, "failed": 1},
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == ["c0", "c1", "c3", "c4", "c2"]
    assert rows[0]["response"]["body"]["choices"][0]["message"]["content"] == "yes 0"
    assert main(["submit", str(source), "--url", api.url]) == 0
    assert main(["submit", str(source), "--url", api.url, "--gen-config", "{}"]) == 2
    assert main(["submit", str(source), "--url", api.url, "--prompt", "more"]) == 2


def test_the_command_line_names_the_lines_of_a_bad_file(
    api: LiveApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([openai_line(0), openai_line(1, method="GET"), *["{"] * 9]))
    assert main(["submit", str(source), "--url", api.url, "--wait", "-o", str(tmp_path / "out.jsonl")]) == 1
    shown = capsys.readouterr().out
    assert "line 2: 'method' must be 'POST'" in shown
    assert "and 5 more" in shown
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.usefixtures("worked")
def test_a_large_file_of_rows_is_uploaded_and_comes_back_in_order(
    api: LiveApi, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.cli.batch_files.LARGE_BYTES", 100)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"p{i}", "custom_id": f"c{i}"}) for i in range(30)) + "\n\n{\n")
    with source.open("a") as file:
        file.write(" " * (1 << 20) + "\n")  # a blank line, so that there is a MiB to send
    assert main(["submit", str(source), "--url", api.url, "--wait", "-o", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("custom_id") for row in rows] == [*(f"c{i}" for i in range(30)), None]
    assert ["error" in row for row in rows] == [index in (2, 30) for index in range(31)]
    shown = capsys.readouterr()
    assert "uploading in.jsonl" in shown.err
    with api.http() as http:
        batch_id = http.get("/v1/batches").json()["data"][0]["id"]
    assert main(["results", batch_id, "--url", api.url, "-o", str(tmp_path / "later.jsonl")]) == 0
    assert (tmp_path / "later.jsonl").read_text() == output.read_text(), "without the file that they were sent in"


def test_which_files_are_uploaded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, expected in {
        b'\n"text"\n': None, b"{": None, b"": None, b"[" * 3000: None, b'"' + b"x" * LARGE_BYTES: ROWS,
        openai_line(0).encode(): CHAT, openai_line(0, url=TEXT).encode(): TEXT,
    }.items():  # fmt: skip
        path.write_bytes(content)
        assert endpoint_of(path) == expected
    path.write_text(openai_line(0, url="/v1/embeddings"))
    with pytest.raises(InvalidRequest, match="embeddings"):
        endpoint_of(path)
    with pytest.raises(NotFound):
        endpoint_of(tmp_path / "nothing")
