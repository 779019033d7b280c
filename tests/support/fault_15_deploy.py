"""A rolling update under load: every worker gets SIGTERM in turn and one of the new release takes its place.

The long form begins with real workers of an earlier commit, from git's history, on the schema of that commit; the new release migrates the
database under them and works beside them on the same Redis.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from fault_ground import (
    MODEL,
    Feed,
    Ground,
    Say,
    ground,
    postgres_of_this_process,
    redis_of_this_process,
    rest,
)
from worker_process import QUICK, ROOT, HeadraceProcess, wait_for

from headrace.settings import Settings

TITLE = "a rolling update, the release before mixed with this one"
BEFORE = "d145b4b"
"""The commit that plays the release before."""
DRAIN_S = 10.0
CLOSE_S = 5.0
"""What a worker may take beyond its drain, to write, close and sign off."""


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Replace every worker by one of this release (three times over); no row may fail and none be computed twice."""
    if not long:
        with ground(chunk_size=8, drain_timeout_s=DRAIN_S) as field:
            return roll(field, [field.worker(pause_s=0.5)], rounds=1, size=80, say=say)
    redis_server, postgres = redis_of_this_process(), postgres_of_this_process()
    redis_server.flush()
    with ground() as other, postgres.database() as url:  # `other`: for its folder and its servers
        settings = Settings(
            model=MODEL, engine_frontend="echo_frontend:EchoFrontend", database_url=url, redis_url=redis_server.url,
            home=other.folder, **{**QUICK, "chunk_size": 8, "drain_timeout_s": DRAIN_S},
        )  # fmt: skip
        (other.folder / "new").mkdir()
        before = Release(other.folder / "before", settings)
        before.run("-m", "headrace.cli", "migrate")
        old = [other.exits.enter_context(before.worker(f"old{number}")) for number in range(3)]
        for worker in old:
            wait_for(lambda worker=worker: "worker_started" in worker.log_tail(), timeout_s=60, what="up", process=worker)
        field = Ground(settings, other.folder / "new", redis_server, postgres)  # migrates the database under them
        field.mixes_releases = True
        other.exits.callback(field.close)
        return roll(field, old, rounds=3, size=600, say=say)


def roll(field: Ground, workers: Sequence[HeadraceProcess], *, rounds: int, size: int, say: Say) -> dict[str, int | float]:
    """Replace the workers one by one while there is always work; the new one first, then SIGTERM to the old one."""
    feed, slowest_s, current = Feed(field, size=size), 0.0, list(workers)
    for number in range(rounds):
        for place, leaving in enumerate(current):
            before = feed.claims()
            wait_for(
                lambda before=before: feed.tick() or feed.claims() > before + 3, timeout_s=60, what="at work", process=leaving
            )
            current[place] = field.service.ready(field.worker(pause_s=0.5 if rounds == 1 else 2.0))
            rest(0.5 if rounds == 1 else 4.0, feed.tick)
            leaving.terminate()
            asked_at = time.monotonic()
            wait_for(
                lambda leaving=leaving: feed.tick() or leaving.process.poll() is not None,
                timeout_s=DRAIN_S + CLOSE_S + 10, what="the old one has ended",
            )  # fmt: skip
            drain_s = time.monotonic() - asked_at
            slowest_s = max(slowest_s, drain_s)
            say(f"round {number + 1}: a worker ended after {drain_s:.1f} s, {feed.done()} rows")
            assert leaving.wait(1) == 0, leaving.log_tail()
            assert drain_s <= DRAIN_S + CLOSE_S, f"a worker took {drain_s:.1f} s to end"
    counts = feed.end(timeout_s=120)
    assert counts["failed"] == 0
    assert counts["started_again_pct"] <= 0, "something was computed again though every worker could drain"
    replaced = rounds * len(workers)
    return {**counts, "workers_replaced": replaced, "slowest_end_s": round(slowest_s, 1), "allowed_s": DRAIN_S + CLOSE_S}


class Release:
    """An earlier commit, unpacked; runs with those of our settings that it knows."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        archive = subprocess.run(
            ["git", "archive", BEFORE, "headrace", "worker", "engine", "kernels", "api", "migrations", "pyproject.toml", "tests/support"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        folder.mkdir()
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        self.folder = folder
        self._settings = settings
        script = "import dataclasses, headrace.settings as s; print(*(f.name for f in dataclasses.fields(s.Settings)))"
        known = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()
        named = {f"HEADRACE_{name.upper()}" for name in known}
        ours = {name: value for name, value in settings.to_environ().items() if name in named}
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        self._environ = outside | ours | {"PYTHONPATH": str(folder / "tests" / "support"), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str) -> None:
        """Run a command of that release to its end."""
        subprocess.run([sys.executable, *arguments], cwd=self.folder, env=self._environ, check=True, capture_output=True)

    def worker(self, name: str) -> OldProcess:
        """Return a worker of that release, not started."""
        echo = {"ECHO_PAUSE_S": "2", "ECHO_TALLY": str(self.folder.parent / "new" / "tally"), "PYTHONUNBUFFERED": "1"}
        arguments = ["-m", "celery", "-A", "worker.app", "worker", "-P", "threads", "-c", "4", "-n", f"{name}@%h"]
        log = self.folder.parent / f"{name}.log"
        return OldProcess(
            [*arguments, "--without-gossip", "--without-mingle"], self._settings, log, self.folder, self._environ | echo
        )


class OldProcess(HeadraceProcess):
    """A process of an earlier commit."""

    def __init__(self, arguments: Sequence[str], settings: Settings, log: Path, root: Path, environ: dict[str, str]) -> None:
        super().__init__(arguments, settings, log)
        self._command = [sys.executable, *arguments]
        self._root = root
        self._whole_environ = environ

    def start(self) -> OldProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=self._root, env=self._whole_environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return self
