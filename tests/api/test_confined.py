"""No request makes the server open a file, however its texts look like paths: watched by Python itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_api import work

from headrace.store import Store


class _Watch:
    """An audit hook can't be taken away again: it is put in once, and sleeps between tests."""

    is_in = False
    is_awake = False
    opened: list[str] = []  # noqa: RUF012  # there is one process to watch

    @classmethod
    def note(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.is_awake and event in ("open", "os.listdir", "os.scandir", "glob.glob", "subprocess.Popen"):
            cls.opened.append(str(arguments[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The paths that this process opens from now on."""
    if not _Watch.is_in:
        sys.addaudithook(_Watch.note)
        _Watch.is_in = True
    _Watch.opened.clear()
    _Watch.is_awake = True
    yield _Watch.opened
    _Watch.is_awake = False


def test_a_path_in_a_request_is_a_text(http: httpx.Client, store: Store, opened: list[str], tmp_path: Path) -> None:
    bait = tmp_path / "bait.jsonl"
    bait.write_text('"secret"\n')
    (tmp_path / "seen").open("w").close()
    assert any(path.endswith("seen") for path in opened), "the hook sees"
    opened.clear()
    for path in (str(bait), f"file://{bait}", f"../../../../../../../../{bait}", f"@{bait}", f"%2e%2e/{bait}"):
        image = {"type": "image_url", "image_url": {"url": path}}
        for body in (
            {"prompts": [path]},
            {"prompts": [[{"role": "user", "content": path}]]},
            {"prompts": [[{"role": "user", "content": [image]}]]},
            {"prompts": ["x"], "model": path},
            {"prompts": ["x"], "metadata": {"path": path}},
            {
                "prompts": ["x"],
                "gen_config": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": path}}}},
            },
            {"input_file_id": path, "endpoint": "/v1/chat/completions", "completion_window": "24h"},
        ):
            assert http.post("/v1/batches", json=body).status_code < 500
        for url in (f"/v1/batches/{path}", f"/v1/files/{path}", f"/v1/files/{path}/content", f"/v1/models/{path}", f"/{path}"):
            assert http.get(url).status_code in (400, 404), url
        upload = {"file": (path, b'{"custom_id": "a"}\n', "application/octet-stream")}
        assert http.post("/v1/files", files=upload, data={"purpose": "batch"}).status_code < 500
    work(store)
    assert not [path for path in opened if "bait" in path]
    assert [file.name for file in tmp_path.iterdir() if file.name not in ("seen", "bait.jsonl")] == []
