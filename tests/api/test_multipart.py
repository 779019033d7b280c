"""The form parser against forms of every cut, and what an upload refuses."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from live_api import LiveApi
from servers import wait_until
from store_driver import count

from api.files import clean_name
from api.multipart import FormParser, PartBegins, PartData, PartEnds, boundary_of
from headrace.broker import Broker
from headrace.errors import InvalidRequest
from headrace.settings import Settings
from headrace.store import Store
from headrace.store.files import PART_BYTES
from headrace.store.tables import file_parts, files

FORM = (
    b'preamble\r\n--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a b.jsonl"\r\nContent-Type: text/plain\r\n\r\n%s\r\n'
    b'--XX\r\ncontent-disposition: form-data; name="empty"\r\n\r\n\r\n--XX--\r\nepilogue'
)


def parse(form: bytes, cuts: list[int]) -> list[tuple[str, str | None, bytes]]:
    parser, parts, data = FormParser("XX"), [], b""
    name: tuple[str, str | None] = ("", None)
    for start, stop in zip([0, *cuts], [*cuts, len(form)], strict=True):
        for event in parser.feed(form[start:stop]):
            if isinstance(event, PartBegins):
                name, data = (event.name, event.filename), b""
            elif isinstance(event, PartData):
                data += event.data
            elif isinstance(event, PartEnds):
                parts.append((*name, data))
    parser.close()
    return parts


def test_it_reads_the_same_wherever_the_pieces_are_cut() -> None:
    rng = random.Random(3)
    # Beginnings of delimiters inside the content.
    for content in (b"", b"\r\n", b"\r\n--X", b"--XX", b"a\r\n--XY\r\n--\r\n-", bytes(range(256)) * 3):
        form = FORM % content
        expected = [("purpose", None, b"batch"), ("file", "a b.jsonl", content), ("empty", None, b"")]
        assert parse(form, []) == expected
        assert parse(form, list(range(1, len(form)))) == expected
        for _ in range(50):
            assert parse(form, sorted(rng.sample(range(len(form)), rng.randrange(1, 9)))) == expected


def test_a_form_that_is_none_is_refused() -> None:
    good = FORM % b"x"
    for bad in (b"", b"nothing", good[:-12], good.replace(b"--XX\r\n", b"--XXy\r\n", 1), b"--XX\r\nContent-Type: a\r\n\r\n\r\n--XX--",
                b"--XX\r\n" + b"a: b\r\n" * 5000):  # fmt: skip
        with pytest.raises(InvalidRequest):
            parse(bad, [])
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 71):
        with pytest.raises(InvalidRequest):
            boundary_of(content_type)


def test_a_name_is_for_eyes_and_never_a_path() -> None:
    assert clean_name("../../etc/passwd") == "passwd"
    assert clean_name("C:\\dir\\a.jsonl") == "a.jsonl"
    assert clean_name("a\0\nb.jsonl") == "ab.jsonl"
    assert clean_name("/") == "upload"
    assert len(clean_name("x" * 1000)) == 255


def send(http: httpx.Client, *parts: tuple[str, tuple[str | None, bytes]]) -> httpx.Response:
    return http.post("/v1/files", files=list(parts))


PURPOSE, FILE = ("purpose", (None, b"batch")), ("file", ("a.jsonl", b"{}\n"))


def test_an_upload_is_refused_by_the_field_that_is_wrong(http: httpx.Client, store: Store) -> None:
    cases = {
        "purpose": [
            (FILE,),
            (("purpose", (None, b"x" * 2000)), FILE),
            (FILE, ("purpose", (None, b"vision"))),
            (PURPOSE, PURPOSE, FILE),
        ],
        "file": [(PURPOSE,), (PURPOSE, FILE, FILE), (PURPOSE, ("file", (None, b"{}")))],
        "other": [(PURPOSE, FILE, ("other", (None, b"1")))],
        "expires_after[anchor]": [(PURPOSE, FILE, ("expires_after[anchor]", (None, b"now")))],
        "expires_after[seconds]": [(PURPOSE, FILE, ("expires_after[seconds]", (None, "²".encode())))],
    }
    for field, forms in cases.items():
        for form in forms:
            response = send(http, *form)
            assert (response.status_code, response.json().get("param")) == (400, field), response.text
    assert http.post("/v1/files", json={}).status_code == 415
    assert http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert count(store, files) == count(store, file_parts) == 0
    assert send(http, FILE, PURPOSE).status_code == 200, "the order of the fields is the sender's"


def test_a_large_file_is_stored_in_parts_and_read_as_it_was(http: httpx.Client, store: Store) -> None:
    content = random.Random(1).randbytes(3 * PART_BYTES + 17)
    file = send(http, PURPOSE, ("file", ("big.jsonl", content))).json()
    assert file["bytes"] == len(content)
    assert count(store, file_parts) == 4
    reply = http.get(f"/v1/files/{file['id']}/content")
    assert reply.content == content
    assert reply.headers["content-length"] == str(len(content))
    assert http.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    assert count(store, file_parts) == 0


def test_a_file_above_the_limit_is_refused_and_nothing_of_it_stays(settings: Settings, store: Store, broker: Broker) -> None:
    with (
        LiveApi(replace(settings, max_file_bytes=2 << 20, max_body_bytes=1 << 20), store=store, broker=broker) as api,
        api.http() as http,
    ):
        response = send(http, PURPOSE, ("file", ("a.jsonl", b"x" * (3 << 20))))
        assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")
        assert "HEADRACE_MAX_FILE_BYTES" in response.json()["detail"]

        def endless() -> Iterator[bytes]:
            yield FORM[: FORM.index(b"%s")]
            for _ in range(100):
                yield b"y" * (1 << 18)

        kind = {"content-type": "multipart/form-data; boundary=XX"}
        response = http.post("/v1/files", content=endless(), headers=kind)
        assert response.status_code == 413
        assert send(http, PURPOSE, ("file", ("a.jsonl", b"x" * (3 << 19)))).status_code == 200, "above max_body_bytes"
        assert (
            http.post("/v1/batches", content=b"x" * (3 << 19), headers={"content-type": "application/json"}).status_code == 413
        )
    assert count(store, files) == 1


def test_a_sender_that_leaves_in_the_middle_leaves_nothing(api: LiveApi, http: httpx.Client, store: Store) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=XX\r\ncontent-length: 99999999\r\n\r\n"
        link.sendall(head + FORM[: FORM.index(b"%s")] + b"z" * (3 * PART_BYTES))
        wait_until(lambda: count(store, file_parts) >= 2, timeout_s=10)
    wait_until(lambda: count(store, files) == 0, timeout_s=10)
    assert http.get("/v1/files").json()["data"] == []
