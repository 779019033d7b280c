"""How fast the store takes prompts in, records answers and gives them back: SQLite and PostgreSQL, every commit on disk.

    python benchmarks/store.py [--rows 50000] [--writers 1] [--only sqlite|postgres]

Prints one JSON line for each database and appends it to benchmarks/results/store.jsonl. A row is a prompt of 1 KB and an answer
of 128 tokens (about 1.3 KB of JSON); rows are recorded 64 to a transaction, as a worker does. PostgreSQL is the one of the dev
group, with fsync on.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import ledger
import sqlalchemy
from servers import PostgresServer

from headrace.completion import Choice, Completion, TokenUsage
from headrace.config import GenerationConfig
from headrace.store import ChunkRef, Store

CHUNK = 64
MODEL = "benchmark"
PROMPT = "x" * 1000
TEXT = "word " * 128
TOKENS = tuple(range(1000, 1128))
USAGE = TokenUsage(prompt_tokens=250, cached_tokens=64, completion_tokens=128)


def completion(index: int) -> Completion:
    choice = Choice(index=0, text=TEXT, token_ids=TOKENS, finish_reason="stop", stop_detail="eos")
    return Completion(index=index, choices=(choice,), usage=USAGE, queue_ms=12.5, run_ms=800.0)


class Stopwatch:
    """Collects the times of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        started = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def median_ms(self, name: str) -> float:
        """Return the middle time in milliseconds."""
        return round(statistics.median(self.seconds[name]) * 1000, 3)

    def p99_ms(self, name: str) -> float:
        """Return the time that one step in a hundred exceeds, in milliseconds."""
        times = sorted(self.seconds[name])
        return round(times[int(len(times) * 0.99)] * 1000, 3)


def work_off(store: Store, ref: ChunkRef, watch: Stopwatch) -> None:
    with watch.step("claim"):
        claim = store.claim_chunk(ref.chunk_id, worker="benchmark", lease_s=60)
    assert claim is not None
    with watch.step("pending"):
        rows = [completion(item.index) for item in store.pending(claim)]
    with watch.step("record"):
        store.record(claim, rows)
    with watch.step("finish"):
        assert store.finish_chunk(claim)


def measure(url: str, rows: int, writers: int) -> dict[str, Any]:
    watch = Stopwatch()
    with Store(url, create=True) as store:
        started = time.perf_counter()
        batch = store.create_batch((f"{i} {PROMPT}" for i in range(rows)), GenerationConfig(), model=MODEL, chunk_size=CHUNK)
        created = time.perf_counter() - started
        refs = []
        while True:
            with watch.step("dispatch"):
                picked = store.next_chunks(model=MODEL, limit=8, grace_s=600)
            if not picked:
                break
            refs += picked
        started = time.perf_counter()
        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(lambda ref: work_off(store, ref, watch), refs))
        worked = time.perf_counter() - started
        for _ in range(200):
            with watch.step("poll"):
                store.get_batch(batch.id)
        started = time.perf_counter()
        streamed = sum(1 for _ in store.stream_results(batch.id))
        read = time.perf_counter() - started
        done = store.get_batch(batch.id)
    assert streamed == done.counts.completed == rows, "a benchmark of wrong results says nothing"
    return {
        "rows": rows,
        "writers": writers,
        "create_rows_per_s": round(rows / created),
        "work_off_rows_per_s": round(rows / worked),
        "stream_rows_per_s": round(rows / read),
        **{f"{name}_ms": watch.median_ms(name) for name in ("dispatch", "claim", "pending", "record", "finish", "poll")},
        "record_p99_ms": watch.p99_ms("record"),
    }


def run(backend: str, rows: int, writers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if backend == "sqlite":
            return measure(f"sqlite:///{folder}/headrace.db", rows, writers)
        with PostgresServer(durable=True) as server, server.database() as url:
            return measure(url, rows, writers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    arguments = parser.parse_args()
    for backend in (arguments.only,) if arguments.only else ("sqlite", "postgres"):
        load = ledger.load()
        figures = run(backend, arguments.rows, arguments.writers)
        peak_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        about = {"benchmark": "store", "backend": backend} | figures | {"peak_rss_mb": peak_mb}
        versions = {"python": platform.python_version(), "sqlalchemy": sqlalchemy.__version__}
        ledger.keep("store", about | ledger.host(load) | versions)


if __name__ == "__main__":
    main()
