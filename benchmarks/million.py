"""A million requests in one file: uploaded, read, answered by an engine that answers at once, and downloaded again.

    python benchmarks/million.py [--lines 1000000] [--only sqlite|postgres] [--workers 1]

The file is made while it is sent and is nowhere whole: each line is one of OpenAI's with a custom_id and sampling parameters of its own
(the seed differs from line to line with --own-configs). A real Redis, database (fsync on), API process and worker share this machine's
cores with the client. For each database one JSON line is printed and appended to benchmarks/results/million.jsonl:

    upload_s, upload_mib_per_s         POST /v1/files, until its reply
    accepted_s                         POST /v1/batches, until its reply: from here on nothing is lost
    read_s, read_lines_per_s           `validating`: the file becomes prompts and chunks
    answered_s, rows_per_s             from `in_progress` to `completed`
    download_s, download_lines_per_s   the output file, each line parsed and its custom_id counted
    api_rss_mib_idle, …_highest        the API process before the upload, and its highest (VmHWM) after all of it; *_upload, *_read, *_run: at those ends
    redis_mib_highest                  Redis's used_memory_peak, less what it used empty
    status_*_ms                        GET /v1/batches/{id}, 20 a second, while the file is read, while it runs, and while it is cancelled
    cancel_reply_s, cancelled_s        the file once more, cancelled as soon as it is read: until the reply, until each prompt has its error
    delete_reply_s                     DELETE of those million
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import httpx
import ledger
import redis
from servers import RedisServer
from service import Service
from service_ground import StatusPoller, api_process, databases, memory_mib

from headrace.settings import Settings

BOUNDARY = "headrace-million"
LINES_AT_ONCE = 2000


def line(number: int, *, own_configs: bool) -> bytes:
    body: dict[str, Any] = {
        "model": "echo",
        "messages": [{"role": "user", "content": f"prompt {number} with a few more words"}],
        "max_tokens": 64,
        "temperature": 0.7,
    }
    if own_configs:
        body["seed"] = number
    return (
        json.dumps({"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
        + b"\n"
    )


class Form:
    """A multipart form whose file is made while it is sent."""

    def __init__(self, lines: int, *, own_configs: bool) -> None:
        self.bytes = 0
        self._lines = lines
        self._own_configs = own_configs

    def __iter__(self) -> Iterator[bytes]:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{BOUNDARY}\r\n'
        yield (head + 'Content-Disposition: form-data; name="file"; filename="million.jsonl"\r\n\r\n').encode()
        for start in range(0, self._lines, LINES_AT_ONCE):
            stop = min(self._lines, start + LINES_AT_ONCE)
            piece = b"".join(line(number, own_configs=self._own_configs) for number in range(start, stop))
            self.bytes += len(piece)
            yield piece
        yield f"\r\n--{BOUNDARY}--\r\n".encode()


def download(http: httpx.Client, file_id: str, lines: int) -> None:
    """Read the output as it comes, and see that each custom_id is there once, with its own answer."""
    seen = bytearray(lines)
    with http.stream("GET", f"/v1/files/{file_id}/content") as reply:
        reply.raise_for_status()
        for text in reply.iter_lines():
            row = json.loads(text)
            number = int(row["custom_id"].removeprefix("row-"))
            said = row["response"]["body"]["choices"][0]["message"]["content"]
            assert said == f"echo prompt {number} with a few more words", row
            seen[number] += 1
    assert seen == b"\1" * lines, "a benchmark of wrong results says nothing"


def cancel_and_delete(http: httpx.Client, base_url: str, body: dict[str, Any], lines: int) -> dict[str, Any]:
    """Make the batch once more, stop it when all of it is open, and delete it."""
    url = f"/v1/batches/{http.post('/v1/batches', json=body | {'metadata': {'again': 'yes'}}).raise_for_status().json()['id']}"
    with StatusPoller(base_url, url.rpartition("/")[2], a_second=20) as poller:
        poller.wait_while("validating", timeout_s=1800)
        poller.take("")
        started = time.perf_counter()
        http.post(f"{url}/cancel").raise_for_status()
        replied = time.perf_counter()
        poller.wait_while("in_progress", "cancelling", timeout_s=600)
        figures = {"cancel_reply_s": round(replied - started, 2), "cancelled_s": round(time.perf_counter() - started, 2)}
        figures |= poller.take("status_cancel")
    over = http.get(url).json()
    assert (over["status"], sum(over["request_counts"][end] for end in ("completed", "failed"))) == ("cancelled", lines), over
    started = time.perf_counter()
    http.delete(url).raise_for_status()
    return figures | {"delete_reply_s": round(time.perf_counter() - started, 2)}


def measure(settings: Settings, folder: Path, server: RedisServer, asked: argparse.Namespace) -> dict[str, Any]:
    """Run everything on one database and return its figures."""
    service, lines = Service(settings, folder), asked.lines
    with ExitStack() as stack:
        link = stack.enter_context(redis.Redis.from_url(server.url))
        api, base_url = stack.enter_context(api_process(settings, folder))
        http = stack.enter_context(httpx.Client(base_url=base_url, timeout=1800))
        workers = [stack.enter_context(service.worker(concurrency=8)) for _ in range(asked.workers)]
        for worker in workers:
            service.ready(worker)
        http.get("/v1/batches").raise_for_status()
        figures: dict[str, Any] = {"lines": lines, "api_rss_mib_idle": memory_mib(api, "VmRSS")}
        redis_empty = link.info("memory")["used_memory"]
        link.config_resetstat()

        form, started = Form(lines, own_configs=asked.own_configs), time.perf_counter()
        kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
        file = http.post("/v1/files", content=iter(form), headers=kind).raise_for_status().json()
        seconds = time.perf_counter() - started
        assert file["bytes"] == form.bytes
        figures |= {"file_mib": round(form.bytes / 2**20), "upload_s": round(seconds, 2)}
        figures |= {"upload_mib_per_s": round(form.bytes / 2**20 / seconds, 1), "api_rss_mib_upload": memory_mib(api, "VmHWM")}
        say("uploaded", figures)

        started = time.perf_counter()
        body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = http.post("/v1/batches", json=body).raise_for_status().json()
        figures["accepted_s"] = round(time.perf_counter() - started, 3)
        with StatusPoller(base_url, batch["id"], a_second=20) as poller:
            poller.wait_while("validating", timeout_s=1800)
            seconds = time.perf_counter() - started
            figures |= {"read_s": round(seconds, 2), "read_lines_per_s": round(lines / seconds), **poller.take("status_read")}
            figures["api_rss_mib_read"] = memory_mib(api, "VmHWM")
            say("read", figures)
            started = time.perf_counter()
            poller.wait_while("in_progress", "finalizing", timeout_s=3600)
            seconds = time.perf_counter() - started
            figures |= {"answered_s": round(seconds, 1), "rows_per_s": round(lines / seconds), **poller.take("status_run")}
        figures |= {"api_rss_mib_run": memory_mib(api, "VmHWM"), "worker_rss_mib": round(workers[0].rss_mib())}
        figures["redis_mib_highest"] = round((link.info("memory")["used_memory_peak"] - redis_empty) / 2**20, 1)
        say("answered", figures)

        over = http.get(f"/v1/batches/{batch['id']}").json()
        assert (over["status"], over["request_counts"]["completed"], over["error_file_id"]) == ("completed", lines, None), over
        started = time.perf_counter()
        download(http, over["output_file_id"], lines)
        seconds = time.perf_counter() - started
        figures |= {"download_s": round(seconds, 1), "download_lines_per_s": round(lines / seconds)}
        say("downloaded", figures)
        figures |= cancel_and_delete(http, base_url, body, lines)
        figures["api_rss_mib_highest"] = memory_mib(api, "VmHWM")
        figures["api_rss_mib_over_idle"] = round(figures["api_rss_mib_highest"] - figures["api_rss_mib_idle"], 1)
    service.close()
    return figures


def say(what: str, figures: dict[str, Any]) -> None:
    print(f"# {what}: {json.dumps(figures)}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure both databases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--own-configs", action="store_true", help="sampling parameters that differ from line to line")
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer())
        for database, url in databases(stack, folder, asked.only):
            load = ledger.load()
            settings = Settings(
                model="echo", engine_frontend="echo_frontend:EchoFrontend", redis_url=server.url, database_url=url, home=folder,
                max_prompts=max(asked.lines, 1_000_000), spool_dir=folder / "spool",
            )  # fmt: skip
            about = {"engine": "echo", "database": database, "own_configs": asked.own_configs, "workers": asked.workers}
            ledger.keep("million", about | measure(settings, folder, server, asked) | ledger.host(load))
            server.flush()


if __name__ == "__main__":
    main()
