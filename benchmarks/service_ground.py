"""The service as a benchmark stands it up: its databases, an API process, and somebody who polls. Knows no workload."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import httpx
from servers import PostgresServer, free_port
from worker_process import HeadraceProcess, wait_for

from headrace.settings import Settings


def databases(stack: ExitStack, folder: Path, only: str | None) -> Iterator[tuple[str, str]]:
    """Yield name and URL of each database, one at a time: PostgreSQL starts after SQLite was measured."""
    if only != "postgres":
        yield "sqlite", f"sqlite:///{folder}/headrace.db"
    if only != "sqlite":
        server = stack.enter_context(PostgresServer(durable=True))
        yield "postgres", stack.enter_context(server.database())


@contextmanager
def api_process(settings: Settings, folder: Path) -> Iterator[tuple[HeadraceProcess, str]]:
    """Run the API, and yield it with its base URL once it answers."""
    port = free_port()
    arguments = ["-m", "uvicorn", "api.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    with HeadraceProcess(arguments, settings, folder / "api.log") as api:
        url = f"http://127.0.0.1:{port}"
        # Not by a line of its log: the API of the database before wrote the same one into the same file.
        wait_for(lambda: _answers(url), timeout_s=60, what="the API is up", process=api)
        yield api, url


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").is_success
    except httpx.TransportError:
        return False


def memory_mib(process: HeadraceProcess, field: str) -> float:
    """Read `VmRSS`, what the process holds, or `VmHWM`, the most it ever held."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return round(next(int(text.split()[1]) for text in lines if text.startswith(field)) / 1024, 1)


class StatusPoller:
    """Asks for a batch's status again and again, and keeps the times."""

    def __init__(self, base_url: str, batch_id: str | None = None, *, a_second: int = 40) -> None:
        """`batch_id` may come later, and change: None polls nothing."""
        self.batch_id = batch_id
        self.batch: dict[str, Any] = {}
        self._times_ms: list[float] = []
        self._base_url = base_url
        self._pause_s = 1 / a_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._base_url, timeout=60) as http:
            while not self._stop.wait(self._pause_s):
                if self.batch_id is not None:
                    started = time.perf_counter()
                    self.batch = http.get(f"/v1/batches/{self.batch_id}").raise_for_status().json()
                    self._times_ms.append(1e3 * (time.perf_counter() - started))

    def take(self, name: str) -> dict[str, float]:
        """Return the figures since the last call, each named `<name>_…`, and begin anew. Without a poll there is no figure but their number."""
        times, self._times_ms = sorted(self._times_ms), []
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0} if times else {}
        figures = {
            f"{name}_{key}_ms": round(times[min(int(len(times) * share), len(times) - 1)], 2) for key, share in shares.items()
        }
        return {**figures, f"{name}_polls": len(times)}

    def wait_while(self, *states: str, timeout_s: float) -> None:
        """Return when the batch is in none of these states any more."""
        deadline = time.monotonic() + timeout_s
        while self.batch.get("status", states[0]) in states:
            assert time.monotonic() < deadline, f"still {self.batch['status']} at {self.batch['request_counts']}"
            time.sleep(0.02)
