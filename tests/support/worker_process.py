"""A real worker process for tests: `celery -A worker.app worker`, with its log, killed and stopped at will."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from headrace.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
QUICK = {
    "visibility_timeout_s": 4.0,
    "lease_s": 3.0,
    "reconcile_interval_s": 0.5,
    "requeue_grace_s": 2.0,
    "drain_timeout_s": 3.0,
    "flush_interval_s": 0.1,
}
"""Settings under which lost work is found again in seconds."""


class HeadraceProcess:
    """One process of headrace, started from the checkout with `settings` as its environment."""

    def __init__(
        self, arguments: Sequence[str], settings: Settings, log: Path, *, environ: Mapping[str, str] | None = None
    ) -> None:
        self.settings = settings
        self.log = log
        self._arguments = list(arguments)
        self._environ = dict(environ or {})
        # Set by start().
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        settings = self.settings
        if settings.spool_dir == Settings().spool_dir:
            # In the checkout a killed worker would leave its spool to the workers of other tests.
            settings = dataclasses.replace(settings, spool_dir=self.log.parent / "spool")
        environ |= {**settings.to_environ(), "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._arguments],
                cwd=ROOT,
                env=environ | self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def rss_mib(self) -> float:
        return psutil.Process(self.pid).memory_info().rss / 2**20

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def kill9(self) -> None:
        """Kill this one process, as the kernel does when memory runs out; its children are left to find out."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float) -> int:
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._arguments} still runs after {timeout_s} s\n{self.log_tail()}") from None

    def log_tail(self, size: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def worker_process(
    settings: Settings, log: Path, *, name: str = "gpu", concurrency: int = 4, environ: Mapping[str, str] | None = None
) -> HeadraceProcess:
    arguments = ["-m", "celery", "-A", "worker.app", "worker", "-P", "threads", "-c", str(concurrency), "-n", f"{name}@%h"]
    return HeadraceProcess([*arguments, "--without-gossip", "--without-mingle"], settings, log, environ=environ)


def wait_for(condition, *, timeout_s: float, what: str, process: HeadraceProcess | None = None, every_s: float = 0.05):
    """Return `condition()` as soon as it is true; fail with the process's log when it dies first or time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        log = "" if process is None else f"\n{process.log_tail()}"
        if process is not None and process.process is not None and process.process.poll() is not None:
            raise AssertionError(f"the process ended with {process.process.poll()} before {what}{log}")
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}{log}")
        time.sleep(every_s)
