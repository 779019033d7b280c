"""OpenAI's way through the real `openai` client: upload a file, make a batch of it, poll, read its output; and what may be wrong with a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_api import LiveApi
from openai.types import Batch, FileObject
from servers import wait_until
from sqlalchemy import delete

from headrace.batch import BatchStatus
from headrace.broker import Broker, dispatch
from headrace.completion import Choice, Completion, CompletionError, TokenLogprobs, TokenUsage
from headrace.settings import Settings
from headrace.store import Store
from headrace.store.tables import files

CHAT = "/v1/chat/completions"


@pytest.fixture
def client(api: LiveApi) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="any") as client:
        yield client


def request(number: int, *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": f"question {number}"}]} if url == CHAT else {"prompt": f"text {number}"}
    return {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": {"model": "echo", **prompt, **body}}


def upload(client: openai.OpenAI, lines: list[Any]) -> FileObject:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")


def create(client: openai.OpenAI, lines: list[Any], *, endpoint: str = CHAT, **options: Any) -> Batch:
    file = upload(client, lines)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)  # type: ignore[arg-type]


def read(client: openai.OpenAI, batch: Batch) -> Batch:
    """Return the batch when its file is read."""
    wait_until(lambda: client.batches.retrieve(batch.id).status != "validating", timeout_s=20)
    return client.batches.retrieve(batch.id)


def answer(store: Store, *, model: str = "echo") -> None:
    """Answer every chunk that is there as a worker does: by the message, each prompt with its own config."""
    refs = store.next_chunks(model=model, limit=1000, grace_s=0)
    until = time.monotonic() + 1
    while not refs and time.monotonic() < until:  # the API is at its own dispatch of them, and holds their rows
        time.sleep(0.02)
        refs = store.next_chunks(model=model, limit=1000, grace_s=0)
    for ref in refs:
        message = store.chunk_message(ref)
        claim = store.claim_chunk(ref.chunk_id, worker="hand", lease_s=60)
        assert claim is not None
        rows = []
        for item in store.pending(claim):
            prompt, config = message.prompts[item.index - ref.start], message.config_of(item.index)
            assert prompt == item.prompt
            error = CompletionError(code="context_length_exceeded", message="too long") if "TOO LONG" in str(prompt) else None
            said = {"prompt": prompt, "config": config.to_dict(), "raw": message.is_raw}
            probabilities = None if config.logprobs is None else (TokenLogprobs(token_id=5, logprob=-0.5, top=((5, -0.5),)),)
            choices = tuple(
                Choice(index=n, text=json.dumps(said), token_ids=(5,), finish_reason="stop", logprobs=probabilities)
                for n in range(config.n)
            )
            usage = TokenUsage(prompt_tokens=7, cached_tokens=3, completion_tokens=2)
            rows.append(Completion(index=item.index, error=error, choices=() if error else choices, usage=usage))
        store.record(claim, rows)
        assert store.finish_chunk(claim)


def content(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_the_way_of_openais_documentation(client: openai.OpenAI, store: Store, broker: Broker) -> None:
    """Each line with its own sampling parameters; every custom_id is in one of the two files, once."""
    lines = [request(0, max_tokens=5, temperature=0), request(1, max_completion_tokens=9, seed=-1, stop="END", n=2)]
    lines += [
        request(2, top_p=0.5, logprobs=True, top_logprobs=3, user="u", stream=False),
        request(3, tools=[{"type": "function"}]),
    ]
    lines += [request(4, temperature=7), request(5, max_tokens=5, temperature=0)]
    lines[5]["body"]["messages"][0]["content"] = [{"type": "text", "text": "TOO "}, {"type": "text", "text": "LONG"}]
    made = create(client, lines, metadata={"set": "one"})
    assert (made.status, made.object, made.metadata) in [
        (status, "batch", {"set": "one"}) for status in ("validating", "in_progress")
    ]
    batch = read(client, made)
    assert (batch.status, batch.model, batch.endpoint) == ("in_progress", "echo", CHAT)
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.failed) == (6, 2)
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    wait_until(lambda: broker.count_waiting("echo") == 1, timeout_s=5)
    store.unsend(store.next_chunks(model="echo", limit=9, grace_s=0))
    answer(store)
    batch = client.batches.retrieve(batch.id)
    Batch.model_validate(batch.model_dump(), strict=True)
    assert batch.status == "completed"
    good, bad = content(client, batch.output_file_id), content(client, batch.error_file_id)
    assert [line["custom_id"] for line in good] == ["row-0", "row-1", "row-2"]
    assert [line["custom_id"] for line in bad] == ["row-3", "row-4", "row-5"]
    configs = [json.loads(line["response"]["body"]["choices"][0]["message"]["content"])["config"] for line in good]
    assert configs[0] == {"max_new_tokens": 5, "temperature": 0, "top_k": 0}
    assert configs[1] == {
        "max_new_tokens": 9, "temperature": 1.0, "top_k": 0, "n": 2, "random_seed": 2**64 - 1, "stop_words": ["END"],
    }  # fmt: skip
    assert configs[2] == {"max_new_tokens": None, "temperature": 1.0, "top_k": 0, "top_p": 0.5, "logprobs": 3}
    for line in good:
        reply = openai.types.chat.ChatCompletion.model_validate(line["response"]["body"], strict=True)
        assert (line["error"], line["response"]["status_code"], reply.model) == (None, 200, "echo")
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 2, 9)
    assert len(good[1]["response"]["body"]["choices"]) == 2
    assert good[2]["response"]["body"]["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:5"
    codes = [(line["error"], line["response"]["status_code"], line["response"]["body"]["error"]["code"]) for line in bad]
    assert codes == [(None, 400, "unsupported_option"), (None, 400, "invalid_request"), (None, 400, "context_length_exceeded")]
    assert "tools" in bad[0]["response"]["body"]["error"]["message"]
    assert "temperature" in bad[1]["response"]["body"]["error"]["message"]


def test_a_message_may_have_a_name_and_one_that_is_no_text_fails_its_line(client: openai.OpenAI, store: Store) -> None:
    named = [{"role": "user", "name": "ann", "content": "a"}, {"role": "user", "name": None, "content": "b"}]
    lines = [
        request(0, messages=named),
        *(request(n, messages=[{**named[0], "name": bad}]) for n, bad in ((1, 7), (2, "\ud83d"))),
    ]
    made = read(client, create(client, lines))
    answer(store)
    batch = client.batches.retrieve(made.id)
    (good,), bad = content(client, batch.output_file_id), content(client, batch.error_file_id)
    said = json.loads(good["response"]["body"]["choices"][0]["message"]["content"])
    assert said["prompt"] == [named[0], {"role": "user", "content": "b"}]
    messages = [line["response"]["body"]["error"]["message"] for line in bad]
    assert "messages[0]: name must be text, not 7" in messages[0]
    assert "surrogate" in messages[1]


def test_completions_are_continued_without_a_template(client: openai.OpenAI, store: Store) -> None:
    made = create(client, [request(0, url="/v1/completions"), request(1, url="/v1/completions", logprobs=0, prompt=["one"])],
                  endpoint="/v1/completions")  # fmt: skip
    read(client, made)
    answer(store)
    batch = client.batches.retrieve(made.id)
    bodies = [line["response"]["body"] for line in content(client, batch.output_file_id)]
    assert batch.error_file_id is None
    said = [json.loads(openai.types.Completion.model_validate(body, strict=True).choices[0].text) for body in bodies]
    assert [(item["prompt"], item["raw"]) for item in said] == [("text 0", True), ("one", True)]
    assert said[0]["config"] == {"max_new_tokens": 16, "temperature": 1.0, "top_k": 0}
    assert bodies[1]["choices"][0]["logprobs"]["tokens"] == ["token_id:5"]


def test_a_batch_whose_every_line_failed_is_completed_and_has_no_output(client: openai.OpenAI) -> None:
    batch = read(client, create(client, [request(0, best_of=3), request(1, messages="x")]))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert [line["custom_id"] for line in content(client, batch.error_file_id)] == ["row-0", "row-1"]


def test_a_cancelled_batch_says_so_of_every_line_that_is_left(client: openai.OpenAI) -> None:
    made = read(client, create(client, [request(0), request(1)]))
    client.batches.cancel(made.id)
    batch = client.batches.retrieve(made.id)
    assert batch.status == "cancelled"
    for line in content(client, batch.error_file_id):
        assert (line["response"], line["error"]["code"]) == (None, "batch_cancelled")


BAD_FILES: dict[str, tuple[list[Any], list[tuple[str, int | None]]]] = {
    "no JSON": ([request(0), "{", request(2)], [("invalid_json_line", 2)]),
    "no object": ([request(0), [1]], [("invalid_json_line", 2)]),
    "not UTF-8, too deep, a number without end": (
        ["[" * 5000, '{"a": ' + "9" * 5000 + "}"], [("invalid_json_line", 1), ("invalid_json_line", 2)],
    ),
    "no custom_id": ([{"method": "POST", "url": CHAT, "body": {}}], [("missing_required_parameter", 1)]),
    "a number as custom_id": ([{**request(0), "custom_id": 7}], [("invalid_type", 1)]),
    "NUL in a custom_id": ([{**request(0), "custom_id": "a\0"}], [("invalid_custom_id", 1)]),
    "half a character in a custom_id": ([{**request(0), "custom_id": "\ud800"}], [("invalid_custom_id", 1)]),
    "another method": ([{**request(0), "method": "GET"}], [("invalid_method", 1)]),
    "another url": ([request(0), request(1, url="/v1/completions")], [("invalid_url", 2)]),
    "a model that isn't served": ([request(0), request(1, model="gpt-9")], [("model_not_found", 2)]),
    "two models": ([request(0), request(1, model="org/other")], [("mismatched_model", 2)]),
    "a name used twice": ([request(0), "", request(1), "  ", request(0), request(1)], [("duplicate_custom_id", 5), ("duplicate_custom_id", 6)]),
    "nothing": ([], [("empty_file", None)]),
    "blank lines": (["", "  "], [("empty_file", None)]),
    "a hundred and more": (["{"] * 150, [("invalid_json_line", number) for number in range(1, 101)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_wrong_fails_its_batch_with_line_numbers(client: openai.OpenAI, store: Store, name: str) -> None:
    lines, expected = BAD_FILES[name]
    batch = read(client, create(client, lines))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert [(error.code, error.line) for error in batch.errors.data or []] == expected
    assert all(error.message for error in batch.errors.data or [])
    assert list(store.stream_results(batch.id)) == []


def test_files_are_listed_paged_read_and_deleted(client: openai.OpenAI) -> None:
    ids = [upload(client, [request(number)]).id for number in range(5)][::-1]
    assert [file.id for file in client.files.list(limit=2)] == ids
    assert [file.id for file in client.files.list(limit=2, order="asc", purpose="batch")] == ids[::-1]
    file = client.files.retrieve(ids[0])
    FileObject.model_validate(file.model_dump(), strict=True)
    text = client.files.content(ids[0]).read()
    assert json.loads(text) == request(4)
    assert (file.bytes, file.filename, file.purpose, file.status, file.expires_at) == (
        len(text), "requests.jsonl", "batch", "processed", None,
    )  # fmt: skip
    assert client.files.delete(ids[0]).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=f"There is no file '{ids[0]}'"):
            call(ids[0])
    with pytest.raises(openai.NotFoundError):
        list(client.files.list(after=ids[0]))


def test_a_file_may_go_when_its_batch_has_been_read(client: openai.OpenAI, store: Store) -> None:
    batch = read(client, create(client, [request(0)]))
    assert batch.input_file_id is not None
    client.files.delete(batch.input_file_id)
    answer(store)
    done = client.batches.retrieve(batch.id)
    assert (done.status, len(content(client, done.output_file_id))) == ("completed", 1)
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(str(done.output_file_id))
    assert f"DELETE /v1/batches/{batch.id}" in refused.value.response.text
    output = client.files.retrieve(str(done.output_file_id))
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    with pytest.raises(openai.NotFoundError):
        client.files.content(str(done.output_file_id).replace("output", "errors"))


def test_files_of_answers_are_listed_with_their_bytes(client: openai.OpenAI, store: Store) -> None:
    lines = [request(number, **({"tools": [{"type": "function"}]} if number == 1 else {})) for number in range(3)]
    lines[2]["custom_id"] = "naïve 水車"
    done = read(client, create(client, lines))
    assert [file.purpose for file in client.files.list()] == ["batch"]
    answer(store)
    done = client.batches.retrieve(done.id)
    ids = [str(done.output_file_id), str(done.error_file_id)]
    for file_id in ids:
        file = client.files.retrieve(file_id)
        FileObject.model_validate(file.model_dump(), strict=True)
        assert (file.bytes, file.status, file.purpose) == (
            len(client.files.content(file_id).read()),
            "processed",
            "batch_output",
        )
        assert file.bytes > 100
    listed = {file.id: file for file in client.files.list(limit=1)}
    assert set(listed) == {*ids, str(done.input_file_id)}
    assert [listed[file_id].bytes for file_id in ids] == [client.files.retrieve(file_id).bytes for file_id in ids]
    assert {file.id for file in client.files.list(purpose="batch_output")} == set(ids)
    assert [file.id for file in client.files.list(purpose="batch")] == [done.input_file_id]
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=ids[0], endpoint=CHAT, completion_window="24h")
    store.files.sweep(retention_s=0)
    assert {file.id for file in client.files.list()} == set(ids), "they go with their batch"
    store.delete_batch(done.id)
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(ids[0])


def test_a_large_file_of_answers_is_counted_in_the_background(
    client: openai.OpenAI, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who looks waits for it: the file is `uploaded` until its bytes are known."""
    monkeypatch.setattr("api.files.COUNT_AT_ONCE", 0)
    monkeypatch.setattr("headrace.output_files.PAGE", 2)
    monkeypatch.setattr("headrace.output_files._PAGES_A_CLAIM", 2)
    batch = read(client, create(client, [request(number) for number in range(9)]))
    answer(store)
    file_id = str(client.batches.retrieve(batch.id).output_file_id)
    wait_until(lambda: client.files.retrieve(file_id).status == "processed", timeout_s=10)
    assert client.files.retrieve(file_id).bytes == len(client.files.content(file_id).read())


def test_the_files_of_a_batch_that_an_older_release_ended_are_listed_once_looked_at(
    client: openai.OpenAI, store: Store
) -> None:
    batch = read(client, create(client, [request(0)]))
    answer(store)
    file_id = str(client.batches.retrieve(batch.id).output_file_id)
    store._database.write(lambda connection: connection.execute(delete(files).where(files.c.id == file_id)))
    assert [file.id for file in client.files.list(purpose="batch_output")] == []
    assert client.files.retrieve(file_id).bytes == len(client.files.content(file_id).read())
    assert [file.id for file in client.files.list(purpose="batch_output")] == [file_id]


def test_a_file_that_expires_says_when(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == pytest.approx(file.created_at + 3600, abs=1)
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 60})
    assert refused.value.param == "expires_after[seconds]"
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", b"{}"), purpose="assistants")
    assert refused.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at"})  # type: ignore[typeddict-item]
    assert refused.value.param == "expires_after[seconds]", "half of it would be ignored"
    assert [stored.id for stored in client.files.list()] == [file.id], "nothing of the refused ones is stored"
    assert list(client.files.list(purpose="fine-tune")) == [], "there is none of another kind"
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(purpose="nonsense")
    assert refused.value.param == "purpose"


def test_a_file_of_plain_rows_is_a_batch_with_one_config(client: openai.OpenAI, api: LiveApi, store: Store) -> None:
    """Bad rows fail alone, as they do in `headrace run`."""
    rows = ["text", {"prompt": "one", "custom_id": "c"}, {"messages": [{"role": "user", "content": "two"}]}]
    rows += [{"nothing": 1, "custom_id": "bad"}]
    file = upload(client, [json.dumps(row) for row in rows] + ["", "{"])
    with api.http() as http:
        body = {"input_file_id": file.id, "gen_config": {"max_new_tokens": 3}, "model": "org/other", "priority": 4}
        made = http.post("/v1/batches", json=body).json()
        assert made["endpoint"] == "/v1/batches"
        wait_until(lambda: store.get_batch(made["id"]).status is BatchStatus.IN_PROGRESS, timeout_s=10)
        answer(store, model="org/other")
        got = [json.loads(line) for line in http.get(f"/v1/batches/{made['id']}/results.jsonl").text.splitlines()]
        assert http.get(f"/v1/batches/{made['id']}/results").json()["data"] == got
    assert [row["error"] and row["error"]["code"] for row in got] == [None, None, None, "invalid_request", "invalid_request"]
    assert json.loads(got[1]["choices"][0]["text"])["config"] == {"max_new_tokens": 3}
    assert [row["custom_id"] for row in got] == [None, "c", None, "bad", None]


def test_retrying_the_failed_lines_keeps_names_and_configs(client: openai.OpenAI, api: LiveApi, store: Store) -> None:
    made = read(
        client, create(client, [request(number, max_tokens=number + 1) for number in range(3)] + [request(3, best_of=2)])
    )
    client.batches.cancel(made.id)
    with api.http() as http:
        again = http.post(f"/v1/batches/{made.id}/retry").json()
    answer(store)
    batch = client.batches.retrieve(again["id"])
    lines = content(client, batch.output_file_id)
    assert [line["custom_id"] for line in lines] == ["row-0", "row-1", "row-2"]
    said = [json.loads(line["response"]["body"]["choices"][0]["message"]["content"]) for line in lines]
    assert [item["config"]["max_new_tokens"] for item in said] == [1, 2, 3]


def test_a_request_that_is_sent_again_finds_its_batch(client: openai.OpenAI) -> None:
    """The client counts its sendings; two calls are two batches all the same."""
    file = upload(client, [request(0)])

    def post(resent: int, **options: Any) -> str:
        headers = {"x-stainless-retry-count": str(resent), **options.pop("headers", {})}
        return client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", extra_headers=headers, **options
        ).id  # fmt: skip

    first = post(0)
    assert post(1) == first
    assert post(2) == first
    second = post(0)
    assert second != first
    assert post(1) == second
    assert post(1, metadata={"another": "request"}) not in (first, second)
    key = {"headers": {"Idempotency-Key": "k"}}
    third = post(0, **key)
    assert post(0, **key) == post(1, **key) == third
    assert third not in (first, second)
    with pytest.raises(openai.BadRequestError) as refused:
        post(0, metadata={"a": "b"}, **key)
    assert refused.value.param == "idempotency_key"
    assert len(list(client.batches.list())) == 4


def test_readers_take_up_what_a_killed_one_left(
    settings: Settings, store: Store, broker: Broker, client: openai.OpenAI
) -> None:
    """An ingest that nobody reads: it is read at the next round of anybody's."""
    from headrace.config import GenerationConfig
    from headrace.store.creation import Order

    file = upload(client, [request(0), request(1)])
    batch_id = store.ingests.create(Order(gen_config=GenerationConfig(), model="echo", endpoint=CHAT), file.id)
    with LiveApi(settings, store=store, broker=broker):
        wait_until(lambda: store.get_batch(batch_id).status is BatchStatus.IN_PROGRESS, timeout_s=15)
    assert dispatch(store, broker, settings, "echo") >= 0
    assert store.get_batch(batch_id).counts.total == 2
