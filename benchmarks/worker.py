"""What everything around an engine costs: prompts a second through SQL, Redis, Celery and back, with an engine that only echoes.

    python benchmarks/worker.py [--rows 20000] [--concurrency 8]

Starts a Redis, a database (SQLite, then PostgreSQL) and one real worker process, checks every row, prints one JSON line for each
database and appends it to benchmarks/results/worker.jsonl. All of them share this machine's cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import ledger
import psutil
from servers import PostgresServer, RedisServer
from service import Service

from headrace.settings import Settings


def measure(settings: Settings, folder: Path, *, rows: int, concurrency: int) -> dict[str, Any]:
    """Run one batch through one worker and return its figures."""
    service = Service(settings, folder)
    with service.worker(concurrency=concurrency) as worker:
        service.ready(worker)
        process = psutil.Process(worker.pid)
        before = process.cpu_times()
        started = time.perf_counter()
        batch_id = service.submit([f"prompt {index} with a few more words" for index in range(rows)])
        stored = time.perf_counter()
        service.wait_over(batch_id, worker, timeout_s=600)
        ended = time.perf_counter()
        after = process.cpu_times()
        service.assert_exactly_once(batch_id, rows)
        cpu_s = after.user + after.system - before.user - before.system
        figures = {
            "stored_per_s": round(rows / (stored - started)),
            "answered_per_s": round(rows / (ended - stored)),
            "worker_cpu_ms_per_row": round(1e3 * cpu_s / rows, 3),
            "worker_rss_mib": round(worker.rss_mib()),
        }
    service.close()
    return figures


def main() -> None:
    """Measure both databases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=8)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        RedisServer() as redis,
        PostgresServer(durable=True) as postgres,
        postgres.database() as url,
    ):
        folder = Path(name)
        echo = Settings(model="echo", engine_frontend="echo_frontend:EchoFrontend", redis_url=redis.url, home=folder)
        for database, database_url in (("sqlite", f"sqlite:///{folder}/headrace.db"), ("postgres", url)):
            settings = dataclasses.replace(echo, database_url=database_url)
            load = ledger.load()
            figures = measure(settings, folder, rows=arguments.rows, concurrency=arguments.concurrency)
            about = {"engine": "echo", "workload": f"{arguments.rows} prompts of 7 words", "database": database}
            ledger.keep("worker", about | {"concurrency": arguments.concurrency} | figures | ledger.host(load))


if __name__ == "__main__":
    main()
