"""OpenAI's documented way against the live service, API and worker in processes of their own, with the client as it comes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from servers import free_port
from service import Service
from worker_process import HeadraceProcess, wait_for

CHAT = "/v1/chat/completions"
LINES = 3000


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_file_goes_in_and_its_answers_come_out(
    echo_service: Callable[..., Service], sqlite_url: str, tmp_path: Path, is_killed: bool
) -> None:
    """Each line with sampling parameters of its own. Killed while it reads the file, the API's next process (or a worker) reads on."""
    service, port = echo_service(sqlite_url), free_port()
    rows = [
        {
            "custom_id": f"row-{number}", "method": "POST", "url": CHAT,
            "body": {"messages": [{"role": "user", "content": f"one two three {number}"}], "max_tokens": 1 + number % 4}
            | ({"tools": [{}]} if number == 7 else {}),
        }
        for number in range(LINES)
    ]  # fmt: skip
    arguments = ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]

    with (
        contextlib.ExitStack() as stack,
        service.worker() as worker,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any") as client,
    ):

        def start(name: str) -> HeadraceProcess:
            process = stack.enter_context(HeadraceProcess(arguments, service.settings, tmp_path / name))
            wait_for(lambda: "Uvicorn running" in process.log_tail(10**6), timeout_s=60, what="the API is up", process=process)
            return process

        api = start("api.log")
        service.ready(worker)
        file = client.files.create(file=("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"k": "v"})
        if is_killed:
            api.kill9()
            start("api2.log")
        wait_for(
            lambda: client.batches.retrieve(batch.id).status == "completed", timeout_s=90, what="it is over", process=worker
        )
        over = client.batches.retrieve(batch.id)
        assert over.request_counts is not None
        assert (over.request_counts.total, over.request_counts.failed) == (LINES, 1)
        good = [json.loads(line) for line in client.files.content(str(over.output_file_id)).iter_lines()]
        (bad,) = [json.loads(line) for line in client.files.content(str(over.error_file_id)).iter_lines()]
        assert [row["custom_id"] for row in good] == [f"row-{number}" for number in range(LINES) if number != 7]
        for row in good:
            number = int(row["custom_id"][4:])
            choice = row["response"]["body"]["choices"][0]
            words = ["one", "two", "three", str(number)][: 1 + number % 4]
            assert choice["message"]["content"] == "echo " + " ".join(words)
            assert choice["finish_reason"] == ("stop" if number % 4 == 3 else "length")
        assert (bad["custom_id"], bad["response"]["status_code"]) == ("row-7", 400)
        service.assert_exactly_once(batch.id, LINES)
