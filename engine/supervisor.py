"""Keeps one group of rank processes alive: starts it, reads it, notices its death within a second, starts it again.

One thread, an event loop, does everything and calls everything back: what a listener keeps needs no lock if it is only touched
from callbacks and from functions given to `post`. This module doesn't know prompts, texts or what a request is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from engine.protocol import Close, Failed, Meeting, Message, Outputs, ProtocolError, Ready, Report, Start
from engine.rank_process import RankProcess
from engine.request import TokenOutput
from headrace.errors import EngineError, HeadraceError, RankLost

log = logging.getLogger(__name__)


class EngineEvent(NamedTuple):
    """Something that an operator wants to know. Kinds: docs/ lists them."""

    kind: str
    message: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How patient a supervisor is; seconds unless said otherwise."""

    watchdog_s: float = 600.0
    """A busy engine that says nothing for so long hangs and is killed. Unless said, 120 s on a GPU, where no step takes seconds."""
    start_timeout_s: float = 3600.0
    """From exec to Ready; loading a large model from a slow disk takes long."""
    close_timeout_s: float = 5.0
    poll_s: float = 0.25
    max_start_failures: int = 3
    """Restarts in a row that don't get as far as Ready before the engine is given up."""
    max_deaths: int = 24
    """Deaths in a row without one finished request in between. Bisecting a full window for a poison prompt needs about a dozen."""
    backoff_s: float = 0.25
    """Pause after an engine died with nothing to do, or before it was ready; doubled each time, up to 10 s. One that died over
    requests is started again at once: what killed it is found by trying."""


class Listener(Protocol):
    """Who uses the engine. Called on the supervisor's thread only; must be quick."""

    def on_ready(self, ready: Ready) -> None:
        """Send requests: a (new) engine takes them."""

    def on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        """News of requests."""

    def on_report(self, report: Report) -> None:
        """Counters that were asked for."""

    def on_death(self, error: HeadraceError) -> None:
        """Take all requests back: the engine died, and another one is started."""

    def on_failed(self, error: HeadraceError) -> None:
        """Answer everything with the error: the engine is given up."""

    def on_closed(self) -> None:
        """Nothing more will come."""

    def is_busy(self) -> bool:
        """Whether the engine owes an answer (the watchdog runs)."""
        ...


def error_of(failed: Failed) -> HeadraceError:
    """Rebuild the exception that a rank reported, of the same class."""
    open_classes: list[type[HeadraceError]] = [EngineError, HeadraceError]
    while open_classes:
        cls = open_classes.pop(0)
        if cls.code == failed.code:
            return cls(failed.message, param=failed.param)
        open_classes += cls.__subclasses__()
    return EngineError(failed.message, param=failed.param)


class Supervisor:
    """See the module. Only `wait_ready` and `close` block."""

    def __init__(
        self,
        options: Mapping[str, Any],
        listener: Listener,
        *,
        size: int = 1,
        command: Sequence[str] | None = None,
        limits: Limits | None = None,
        on_event: Callable[[EngineEvent], None] | None = None,
    ) -> None:
        """Prepare; `command` replaces `python -m engine.rank` (tests)."""
        self._options = dict(options)
        self._listener = listener
        self._size = size
        self._command = command
        self._limits = limits or (Limits(watchdog_s=120.0) if options.get("device") == "cuda" else Limits())
        self._on_event = on_event
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wake)
        self._posts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Between "is it closed?" and the write that wakes the loop. Reentrant: the garbage collector may close a dropped iterator,
        # which posts an abort, while this thread is in `post`.
        self._post_lock = threading.RLock()
        self._closing = False
        self._ended = False
        self._group: list[RankProcess] = []
        self._is_ready = False
        self._death: HeadraceError | None = None
        self._sign = 0.0
        self._deaths = 0
        self._start_failures = 0
        self._causeless = 0
        self._first = threading.Event()
        self._first_error: HeadraceError | None = None
        self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)

    # ---- called from any thread

    def start(self) -> None:
        """Begin to start the engine."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Wait for the first engine; raise what it failed with."""
        try:
            self._first.wait()
        except BaseException:  # Ctrl-C while the model loads
            self.close()
            raise
        if self._first_error is not None:
            self.close()
            raise self._first_error

    def post(self, function: Callable[[], None]) -> bool:
        """Have `function` called on the supervisor's thread; False when that has ended."""
        with self._post_lock:
            if self._ended:
                return False
            self._posts.put(function)
            self._wake()
            return True

    def close(self) -> None:
        """Stop the engine; wait until its processes are gone. May be called twice, and from a callback (then it doesn't wait)."""
        with self._post_lock:
            self._closing = True
            if not self._ended:
                self._wake()
        if not self.is_own_thread and self._thread.ident is not None:
            self._thread.join()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, rank 0 first."""
        return tuple(process.pid for process in self._group)

    @property
    def is_alive(self) -> bool:
        """Whether an engine is ready at this moment."""
        return self._is_ready

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the supervisor's thread and so must not wait for it."""
        return threading.current_thread() is self._thread

    # ---- called on the supervisor's thread

    def send(self, message: Message) -> None:
        """Send to rank 0. Nothing is sent to an engine that isn't ready."""
        if self._is_ready:
            self._group[0].send(message)

    def note_progress(self) -> None:
        """Count the deaths anew: a request was finished, so the engine works."""
        self._deaths = self._causeless = 0

    def emit(self, level: int, kind: str, message: str, **fields: Any) -> None:
        """Log an event and tell who listens to events."""
        log.log(level, "%s", message, extra={"event": kind, **fields})
        if self._on_event is not None:
            self._guard(partial(self._on_event, EngineEvent(kind, message, fields)))

    # ---- the loop

    def _run(self) -> None:
        try:
            while not self._closing and self._may_start():
                self._run_group()
            while not self._closing:  # given up: answer every submission with the error until someone closes
                self._poll(None)
        finally:
            self._stop_group()
            with self._post_lock:
                self._ended = True
            self._run_posts()
            self._guard(self._listener.on_closed)
            self._first.set()
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _may_start(self) -> bool:
        """Wait out the backoff; False when the engine has died too often."""
        error = self._death
        self._death = None
        if error is None:
            return True
        if not self._first.is_set():
            self._first_error = error
            self._first.set()
            return False
        if self._start_failures >= self._limits.max_start_failures or self._deaths >= self._limits.max_deaths:
            message = f"The engine is given up after {self._deaths} deaths in a row: {error.message}"
            self.emit(logging.ERROR, "engine_given_up", message, deaths=self._deaths)
            self._guard(partial(self._listener.on_failed, EngineError(message)))
            return False
        pause = min(self._limits.backoff_s * 2 ** (self._causeless - 1), 10.0) if self._causeless else 0.0
        self.emit(
            logging.WARNING,
            "engine_restarting",
            f"The engine is started again in {pause:g} s.",
            deaths=self._deaths,
            pause_s=pause,
        )
        until = time.monotonic() + pause
        while not self._closing and (left := until - time.monotonic()) > 0:
            self._poll(left)
        return not self._closing

    def _run_group(self) -> None:
        started = time.monotonic()
        try:
            for rank in range(self._size):
                self._group.append(process := RankProcess(rank, self._command))
                self._selector.register(process.stdout, selectors.EVENT_READ, partial(self._read, process))
                self._selector.register(process.stderr, selectors.EVENT_READ, partial(self._read_stderr, process))
            self._group[0].send(self._start_message(0, ""))
        except OSError as error:
            self._death = EngineError(f"the engine process can't be started: {error}")
        while self._death is None and not self._closing:
            self._poll(self._limits.poll_s)
            self._examine(started)
        was_ready, was_busy = self._is_ready, self._listener.is_busy()
        self._stop_group()
        if self._death is not None and not self._closing:
            self._deaths += 1
            self._causeless = 0 if was_ready and was_busy else self._causeless + 1
            self._start_failures = 0 if was_ready else self._start_failures + 1
            if was_ready:
                self.emit(
                    logging.ERROR,
                    "engine_died",
                    f"{self._death.message}\nUnfinished requests are computed again.",
                    deaths=self._deaths,
                )
                self._guard(partial(self._listener.on_death, self._death))

    def _start_message(self, rank: int, rendezvous: str) -> Start:
        level = logging.getLevelName(log.getEffectiveLevel())
        return Start(options=self._options, rank=rank, size=self._size, rendezvous=rendezvous, log_level=level)

    def _examine(self, started: float) -> None:
        """Look for what no pipe tells: an exit with the pipe held open, a hang."""
        now = time.monotonic()
        for process in self._group:
            if self._death is None and process.returncode() is not None:
                while self._read(process):  # what it said before it died still counts
                    pass
                self._lose(process)
        if not self._is_ready:
            if now - started > self._limits.start_timeout_s and self._death is None:
                self._death = EngineError(f"the engine was not ready after {self._limits.start_timeout_s:g} s{self._tail()}")
        elif not self._listener.is_busy():
            self._sign = now
        elif now - self._sign > self._limits.watchdog_s and self._death is None:
            self._death = RankLost(f"the engine made no step for {self._limits.watchdog_s:g} s and is killed{self._tail()}")

    def _read(self, process: RankProcess) -> bool:
        """Handle what a rank says; False when there was nothing."""
        try:
            messages = process.read()
            if messages is None:
                self._lose(process)
                return False
            handled = False
            for message in messages:
                self._handle(process, message)
                handled = True
        except ProtocolError as error:
            self._death = self._death or RankLost(f"engine rank {process.rank} wrote something else to its pipe: {error}")
            return False
        return handled

    def _read_stderr(self, process: RankProcess) -> None:
        if not process.read_stderr():
            self._selector.unregister(process.stderr)

    def _handle(self, process: RankProcess, message: Message) -> None:
        self._sign = time.monotonic()
        match message:
            case Outputs(outputs):
                self._guard(partial(self._listener.on_outputs, outputs))
            case Report():
                self._guard(partial(self._listener.on_report, message))
            case Meeting(rendezvous):
                for other in self._group[1:]:
                    other.send(self._start_message(other.rank, rendezvous))
            case Ready():
                self._is_ready = True
                self._start_failures = 0
                self.emit(logging.INFO, "engine_ready", "The engine is ready.", pids=self.pids, facts=message.facts)
                self._guard(partial(self._listener.on_ready, message))
                self._first.set()
            case Failed():
                self._death = self._death or error_of(message)
            case _:
                log.debug("rank %d: %s", process.rank, message)

    def _lose(self, process: RankProcess) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(process.stdout)
        if self._death is not None:
            return
        until = time.monotonic() + 0.3  # its pipe closes a moment before its exit status is known
        while (code := process.returncode()) is None and time.monotonic() < until:
            time.sleep(0.005)
        how = (
            "closed its pipe" if code is None else f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        )
        process.read_stderr()
        self._death = RankLost(f"engine rank {process.rank} (process {process.pid}) {how}{self._tail()}")

    def _tail(self) -> str:
        tails = [f"\n  rank {process.rank} said last:\n{process.stderr_tail}" for process in self._group if process.stderr_tail]
        return "".join(tails)

    def _stop_group(self) -> None:
        """Close the ranks in order if there is time for it, kill what is left, all of it together."""
        if self._closing and self._is_ready and self._death is None:
            for process in self._group:
                process.send(Close())
            until = time.monotonic() + self._limits.close_timeout_s
            while any(process.returncode() is None for process in self._group) and time.monotonic() < until:
                self._poll(0.02)
        self._is_ready = False
        for process in self._group:
            for fd in (process.stdout, process.stderr):
                with contextlib.suppress(KeyError):
                    self._selector.unregister(fd)
        for process in self._group:
            process.kill()
        self._group = []

    def _poll(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            key.data()
        self._run_posts()

    def _run_posts(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._guard(self._posts.get_nowait())

    def _guard(self, function: Callable[[], None]) -> None:
        """Call back; one caller's bug must not stop everybody's engine."""
        try:
            function()
        except Exception:
            log.exception(
                "A callback failed; what it was for may be lost, the engine goes on.", extra={"event": "callback_failed"}
            )

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
