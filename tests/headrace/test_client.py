"""The client against a real server: everything it does, and what it does when the connection or the server fails."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from live_api import LiveApi, work
from servers import RedisServer, free_port
from store_driver import answer, work_off

from headrace.batch import BatchStatus
from headrace.broker import Broker, make_celery
from headrace.client import Client
from headrace.config import GenerationConfig
from headrace.errors import (
    Conflict,
    HeadraceError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    ServiceUnavailable,
    StoreUnavailable,
    Unauthorized,
)
from headrace.settings import Settings
from headrace.store import Store


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def settings(redis: RedisServer, tmp_path: Path) -> Settings:
    redis.flush()
    return Settings(
        models="echo,org/other",
        database_url=f"sqlite:///{tmp_path}/headrace.db",
        redis_url=redis.url,
        api_key="k3y",
        max_body_bytes=4 << 20,
        chunk_size=8,
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with Store(settings.database_url, create=True) as store:
        yield store


@pytest.fixture
def api(settings: Settings, store: Store) -> Iterator[LiveApi]:
    broker = Broker(make_celery(settings))
    with LiveApi(settings, store=store, broker=broker) as live:
        yield live
    broker.close()


@pytest.fixture
def client(api: LiveApi) -> Iterator[Client]:
    with Client(f"{api.url}/v1/", api_key="k3y") as client:
        yield client


class Faulty(httpx.HTTPTransport):
    """A real transport on which `fault(number, request)` may raise or answer instead, before or `after` the server has answered."""

    def __init__(self, fault: Callable[[int, httpx.Request], httpx.Response | None], *, after: bool = False) -> None:
        super().__init__()
        self.fault, self.after = fault, after
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.after:
            response = super().handle_request(request)
            response.read()
            return self.fault(len(self.requests), request) or response
        return self.fault(len(self.requests), request) or super().handle_request(request)


def test_a_batch_from_submission_to_results(client: Client, store: Store) -> None:
    config = GenerationConfig(max_new_tokens=9, stop_words=("#",), logit_bias={3: -1.0}, random_seed=2**64 - 1)
    prompts = [*(f"p{i} 🎉" for i in range(19)), [{"role": "user", "content": "x"}]]
    batch = client.submit(prompts, config, model="org/other", metadata={"k": "v"}, priority=2, completion_window="30m")
    stored = store.get_batch(batch.id)
    assert (batch.gen_config, batch.model, batch.metadata, batch.priority) == (config, "org/other", {"k": "v"}, 2)
    assert (
        batch
        == client.get(batch.id)
        == replace(
            stored,
            **{
                name: int(value)
                for name in ("created_at", "expires_at", "in_progress_at")
                if (value := getattr(stored, name)) is not None
            },
        )
    )
    threading.Timer(0.3, lambda: work(store, model="org/other", failing=[4])).start()
    seen = []
    done = client.wait(batch.id, on_progress=seen.append, timeout=20)
    assert done.status is BatchStatus.COMPLETED
    assert (seen[0].counts.done, seen[-1]) == (0, done)
    assert (done.counts.total, done.counts.completed, done.counts.failed) == (20, 19, 1)
    assert done.usage == store.get_batch(batch.id).usage
    assert list(client.results(batch.id)) == store.results(batch.id)
    assert [c.index for c in client.results(batch.id, after=16)] == [17, 18, 19]


def test_wait_gives_up_in_time_and_the_batch_goes_on(client: Client) -> None:
    batch = client.submit(["a"])
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=batch.id):
        client.wait(batch.id, timeout=0.3)
    assert time.monotonic() - begin < 10
    assert client.get(batch.id).status is BatchStatus.IN_PROGRESS


def test_cancel_list_and_models(client: Client) -> None:
    ids = [client.submit(["a"]).id for _ in range(5)][::-1]
    assert [batch.id for batch in client.list(page_size=2)] == ids
    assert client.cancel(ids[0]).status is BatchStatus.CANCELLED
    assert client.cancel(ids[0]).status is BatchStatus.CANCELLED, "what was wanted is the case"
    assert [batch.id for batch in client.list(status=BatchStatus.CANCELLED)] == ids[:1]
    assert client.models() == ("echo", "org/other")


def test_cancelling_what_is_over_is_a_conflict(client: Client, store: Store) -> None:
    batch = client.submit(["a"])
    work(store)
    with pytest.raises(Conflict):
        client.cancel(batch.id)


def test_problems_are_the_servers_own_exceptions(api: LiveApi, client: Client) -> None:
    with pytest.raises(ModelNotFound, match="org/other") as missing:
        client.submit(["a"], model="gpt-9")
    assert missing.value.param == "model"
    with pytest.raises(NotFound):
        client.get("batch_" + "0" * 32)
    with pytest.raises(NotFound):
        next(client.results("batch_" + "0" * 32))
    with pytest.raises(InvalidRequest) as wrong:
        client.submit(["a", 5])  # type: ignore[list-item]
    assert (wrong.value.param, wrong.value.index) == ("prompts", 1)
    with pytest.raises(InvalidRequest, match="empty"):
        client.submit([])
    with pytest.raises(InvalidRequest) as half:
        client.submit(["a", "b\ud800"])
    assert half.value.index == 1
    with pytest.raises(PayloadTooLarge, match="MAX_BODY_BYTES"):
        client.submit(["x" * (1 << 20)] * 64)
    with Client(api.url, api_key="wrong") as stranger, pytest.raises(Unauthorized):
        stranger.models()


def test_a_submission_whose_reply_is_lost_is_one_batch(api: LiveApi) -> None:
    def lose(number: int, request: httpx.Request) -> None:
        if number <= 2:
            raise httpx.ReadError("connection reset", request=request)

    transport = Faulty(lose, after=True)
    with Client(api.url, api_key="k3y", transport=transport) as client:
        batch = client.submit(["a", "b"])
        assert len(transport.requests) == 3
        assert [found.id for found in client.list()] == [batch.id]
        assert len({request.headers["idempotency-key"] for request in transport.requests[:3]}) == 1


def test_busy_answers_are_repeated_and_others_are_not(api: LiveApi) -> None:
    def busy(number: int, request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(503, headers={"retry-after": "0"}, request=request) if number in (1, 2) else None

    with Client(api.url, api_key="k3y", transport=(transport := Faulty(busy))) as client:
        assert client.models() == ("echo", "org/other")
        assert len(transport.requests) == 3

    def firm(number: int, request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            503, headers={"retry-after": "3600"}, json={"code": "store_unavailable", "detail": "x"}, request=request
        )

    with Client(api.url, transport=(transport := Faulty(firm))) as client, pytest.raises(StoreUnavailable):
        client.models()
    assert len(transport.requests) == 1, "an hour isn't waited for"


def test_results_resume_after_every_broken_connection(api: LiveApi, store: Store) -> None:
    class Cut(httpx.SyncByteStream):
        def __init__(self, inner: httpx.SyncByteStream) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[bytes]:
            # In the middle of a line: half a row must not count as one.
            yield b"".join(itertools.islice(self.inner, 1))[:1000]
            raise httpx.ReadError("connection reset")

        def close(self) -> None:
            self.inner.close()

    class Cutting(httpx.HTTPTransport):
        after: list[str] = []  # noqa: RUF012

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            response = super().handle_request(request)
            self.after.append(request.url.params["after"])
            return httpx.Response(response.status_code, headers=response.headers, stream=Cut(response.stream), request=request)  # type: ignore[arg-type]

    batch = store.create_batch(["p"] * 10, GenerationConfig(), model="echo")
    work(store)
    with Client(api.url, api_key="k3y", transport=Cutting(), max_retries=0) as client:
        rows = client.results(batch.id)
        got = [next(rows) for _ in range(3)]
        with pytest.raises(ServiceUnavailable):
            list(rows)
    assert [row.index for row in got] == [0, 1, 2]
    Cutting.after.clear()
    with Client(api.url, api_key="k3y", transport=Cutting(), max_retries=1) as client:
        assert [row.index for row in client.results(batch.id)] == list(range(10))
    assert len(Cutting.after) > 2, "the stream was cut more than once"
    assert Cutting.after == sorted(set(Cutting.after), key=int), "each stream went on where the last one ended"


def test_following_a_running_batch_yields_all_of_it_in_order(client: Client, store: Store) -> None:
    batch = client.submit(["p"] * 24)
    assert list(client.results(batch.id)) == []

    refs = store.next_chunks(model="echo", limit=9, grace_s=0)
    claims = [claim for ref in refs if (claim := store.claim_chunk(ref.chunk_id, worker="w", lease_s=60))]
    assert len(claims) == 3

    def finish(order: tuple[int, ...]) -> None:
        for number in order:
            time.sleep(0.2)
            work_off(store, [claims[number]])

    thread = threading.Thread(target=finish, args=((2, 0, 1),))
    thread.start()
    rows = list(client.results(batch.id, follow=True))
    thread.join()
    assert [row.index for row in rows] == list(range(24))
    assert rows == store.results(batch.id)


def test_a_base_url_that_is_none_is_named() -> None:
    with pytest.raises(InvalidRequest, match="base_url"):
        Client("http://[::1")


def test_no_server_is_said_with_what_to_do() -> None:
    with Client(f"http://127.0.0.1:{free_port()}", max_retries=0) as client:
        for call in (client.models, lambda: client.submit(["a"]), lambda: list(client.results("batch_x"))):
            with pytest.raises(ServiceUnavailable, match="headrace up") as caught:
                call()
            assert isinstance(caught.value, HeadraceError)


def test_an_answer_that_is_no_problem_is_still_an_error(api: LiveApi) -> None:
    def proxy(_number: int, request: httpx.Request) -> httpx.Response:
        return httpx.Response(int(request.url.params.get("limit", 500)), text="<html>", request=request)

    with Client(api.url, transport=Faulty(proxy), max_retries=0) as client:
        with pytest.raises(HeadraceError, match="500"):
            client.models()
        with pytest.raises(NotFound, match="404"):
            list(client.list(page_size=404))


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_delete_whose_reply_was_lost_is_done(is_lost: bool) -> None:
    calls = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.method)
        if is_lost and len(calls) == 1:
            raise httpx.ReadError("lost", request=request)
        return httpx.Response(404, json={"code": "not_found", "detail": "no batch"})

    with Client(transport=httpx.MockTransport(answer)) as client:
        if is_lost:
            client.delete("batch_x")
        else:
            with pytest.raises(NotFound):
                client.delete("batch_x")
    assert calls == ["DELETE"] * (2 if is_lost else 1)


def test_a_line_ends_where_json_lines_end_and_nowhere_else() -> None:
    """Python's own lines end at U+2028, U+2029 and U+0085, too, which JSON leaves as they are in a text."""
    texts = ["one\u2028two", "\u2029\u0085", "r\r\n", ""]
    rows = [answer(index) for index in range(len(texts))]
    rows = [replace(row, choices=(replace(row.choices[0], text=text),)) for row, text in zip(rows, texts, strict=True)]
    whole = "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows).encode()

    def serve(_: httpx.Request) -> httpx.Response:
        pieces = (whole[start : start + 7] for start in range(0, len(whole), 7))
        return httpx.Response(200, headers={"headrace-total": str(len(rows))}, content=pieces)

    with Client(transport=httpx.MockTransport(serve)) as client:
        assert list(client.results("batch_1")) == rows
        assert [json.loads(line) for line in client.file_content("file-1")] == [
            json.loads(line) for line in whole.split(b"\n")[:-1]
        ]
