"""The service end to end, with an engine that answers at once: what REST, SQL, Redis and Celery cost together.

    python benchmarks/service.py [--rows 60000] [--million 1000000] [--only sqlite|postgres] [--record]

A real Redis, database (fsync on), API process and one worker process share this machine's cores, with the client beside them. For
each database one JSON line is printed, and with `--record` appended to benchmarks/results/service.jsonl; each figure that has a
target is judged by it, and the exit status is 1 when one is missed:

    prompts_per_s      from the first POST to the end of the last batch: rows in batches of 10,000 over HTTP
    status_*_ms        GET /v1/batches/{id} while that runs, 40 a second, after the last POST was answered
    submit_status_*    the same before that: the API parses and stores 10,000 prompts at a time beside it
    results_per_s      results.jsonl of those batches, read as bytes
    million_*          one batch of `--million` prompts: seconds until 202, the API's memory before and at its highest, cancel, and the
                       million results streamed; the same through Store.create_batch from a generator, in a process of its own
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import httpx
import ledger
from servers import RedisServer
from service import Service
from service_ground import StatusPoller, api_process, databases, memory_mib
from worker_process import HeadraceProcess

from headrace.settings import Settings

BATCH = 10_000
TARGETS = {
    "prompts_per_s": ("at least", {"postgres": 2000, "sqlite": 1000}),
    "status_p99_ms": ("below", {"postgres": 20, "sqlite": 20}),
    "results_per_s": ("at least", {"postgres": 20_000, "sqlite": 20_000}),
    "million_results_per_s": ("at least", {"postgres": 20_000, "sqlite": 20_000}),
}
"""Of two cores that nobody else uses."""
IS_THERE = """
import sys
sys.path[:0] = [sys.argv[1]]
from headrace.config import GenerationConfig
from headrace.store import Store
def peak():  # not getrusage: its figure begins with the parent's
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
with Store(sys.argv[2]) as store:
    store.create_batch((f"prompt {i} with a few more words" for i in range(1000)), GenerationConfig(), model="other")
    before = peak()
    store.create_batch((f"prompt {i} with a few more words" for i in range(int(sys.argv[3]))), GenerationConfig(), model="other")
    print(before, peak())
"""


def prompts(count: int) -> list[str]:
    return [f"prompt {index} with a few more words" for index in range(count)]


def post(http: httpx.Client, body: bytes) -> str:
    reply = http.post("/v1/batches", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def count_lines(http: httpx.Client, batch_id: str) -> int:
    count = 0
    with http.stream("GET", f"/v1/batches/{batch_id}/results.jsonl") as reply:
        for piece in reply.iter_bytes(1 << 20):
            count += piece.count(b"\n")
    return count


def measure_overhead(service: Service, http: httpx.Client, base_url: str, rows: int) -> dict[str, Any]:
    body = json.dumps({"prompts": prompts(BATCH)}).encode()
    with service.worker(concurrency=8) as worker, StatusPoller(base_url) as poller:
        service.ready(worker)
        started = time.perf_counter()
        ids: list[str] = []
        for _ in range(rows // BATCH):
            ids.append(post(http, body))
            poller.batch_id = ids[-1]
        status = poller.take("submit_status")
        for batch_id in ids:
            service.wait_over(batch_id, worker, timeout_s=600)
        seconds = time.perf_counter() - started
        worker_mib = round(worker.rss_mib())
        status |= poller.take("status")
    started = time.perf_counter()
    streamed = sum(count_lines(http, batch_id) for batch_id in ids)
    stream_s = time.perf_counter() - started
    for batch_id in ids:
        service.assert_exactly_once(batch_id, BATCH)
    assert streamed == len(ids) * BATCH, "a benchmark of wrong results says nothing"
    return {
        "rows": streamed,
        "prompts_per_s": round(streamed / seconds),
        **status,
        "results_per_s": round(streamed / stream_s),
        "worker_rss_mib": worker_mib,
    }


def measure_million(service: Service, http: httpx.Client, api: HeadraceProcess, count: int) -> dict[str, Any]:
    body = json.dumps({"prompts": prompts(count)}).encode()
    before = round(memory_mib(api, "VmHWM"))
    started = time.perf_counter()
    batch_id = post(http, body)
    accepted_s = time.perf_counter() - started
    highest, after = round(memory_mib(api, "VmHWM")), round(api.rss_mib())
    started = time.perf_counter()
    assert http.post(f"/v1/batches/{batch_id}/cancel").json()["request_counts"]["failed"] == count
    cancelled_s = time.perf_counter() - started
    started = time.perf_counter()
    assert count_lines(http, batch_id) == count
    stream_s = time.perf_counter() - started
    command = [sys.executable, "-c", IS_THERE, str(ROOT), service.settings.database_url, str(count)]
    started = time.perf_counter()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603  # our own code, above
    store_before, store_peak = map(float, printed.split())
    return {
        "million_rows": count,
        "million_body_mib": len(body) >> 20,
        "million_accepted_s": round(accepted_s, 1),
        "million_api_rss_mib_before": before,
        "million_api_rss_mib_highest": highest,
        "million_api_rss_mib_after": after,
        "million_cancelled_s": round(cancelled_s, 1),
        "million_results_per_s": round(count / stream_s),
        "million_store_s": round(time.perf_counter() - started, 1),
        "million_store_rss_mib_before": round(store_before),
        "million_store_rss_mib_highest": round(store_peak),
    }


def measure(settings: Settings, folder: Path, *, rows: int, million: int) -> dict[str, Any]:
    """Run everything on one database and return its figures."""
    service = Service(settings, folder)
    with api_process(settings, folder) as (api, base_url), httpx.Client(base_url=base_url, timeout=600) as http:
        figures = measure_overhead(service, http, base_url, rows)
        if million:
            figures |= measure_million(service, http, api, million)
    service.close()
    return figures


def judge(database: str, figures: dict[str, Any]) -> list[str]:
    """Print each target with what was measured; return the names of those that were missed."""
    missed = []
    for name, (relation, targets) in TARGETS.items():
        if name not in figures:
            continue
        target = targets[database]
        is_met = figures[name] >= target if relation == "at least" else figures[name] < target
        print(f"{database} {name}: {figures[name]:,} ({relation} {target:,}): {'met' if is_met else 'MISSED'}", flush=True)
        if not is_met:
            missed.append(name)
    return missed


def main() -> int:
    """Measure both databases; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000, help=f"a multiple of {BATCH}")
    parser.add_argument("--million", type=int, default=1_000_000, help="0: leave it out")
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--record", action="store_true", help="append the lines to benchmarks/results/service.jsonl")
    asked = parser.parse_args()
    missed: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(RedisServer())
        for database, url in databases(stack, folder, asked.only):
            load = ledger.load()
            settings = Settings(
                model="echo", engine_frontend="echo_frontend:EchoFrontend", redis_url=redis.url, database_url=url, home=folder
            )
            figures = measure(settings, folder, rows=asked.rows, million=asked.million)
            about = {"engine": "echo", "workload": f"{asked.rows} prompts of 7 words", "database": database}
            ledger.keep("service", about | figures | ledger.host(load), append=asked.record)
            missed += judge(database, figures)
            redis.flush()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
