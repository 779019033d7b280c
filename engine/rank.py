"""The main program of an engine process: `python -m engine.rank`, started by `engine.supervisor`, spoken to over its pipes.

Rank 0 runs the engine; the other ranks of a tensor-parallel group run the plans that rank 0 sends them. A process that has lost
its parent ends at once: the end of file on its command pipe says so, or, within a second, another parent's id. This module doesn't
know prompts or texts.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine import garbage
from engine.protocol import (
    Abort,
    AskReport,
    Close,
    Failed,
    FrameReader,
    Meeting,
    Message,
    Outputs,
    Ready,
    Report,
    Start,
    Submit,
    Tick,
    encode,
)
from headrace.errors import EngineError, HeadraceError
from headrace.log import configure

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.options import EngineOptions

log = logging.getLogger(__name__)

_TICK_S = 1.0
_PARENT_S = 1.0
"""How often a process that hears nothing looks whether its parent is still the same."""
_TIDY_S = 20.0
"""How often an idle engine collects garbage. The interpreter itself does so for old objects once in a hundred thousand requests, and until
then its free lists grow, by megabytes."""


class ParentPipe:
    """Both pipes to the parent. A thread always reads, so that the parent never waits for a step to end."""

    def __init__(self) -> None:
        """Take the pipes over from stdin and stdout, which go to nowhere and to stderr from now on.

        A library that prints would otherwise tear the frames.
        """
        self._parent = os.getppid()
        self._in, self._out = os.dup(0), os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.dup2(2, 1)
        os.close(nowhere)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def take(self, *, wait: bool) -> Iterator[Message]:
        """Give the messages that are there; with `wait`, sleep until there is one."""
        try:
            yield self._inbox.get(block=wait)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def send(self, message: Message) -> None:
        """Write one message."""
        view = memoryview(encode(message))
        try:
            while view:
                view = view[os.write(self._out, view) :]
        except OSError:
            _leave()

    def _read(self) -> None:
        try:
            frames = FrameReader()
            while self._has_news() and (messages := frames.read(self._in)) is not None:
                for message in messages:
                    self._inbox.put(message)
        except Exception:
            # With nobody reading, the process would never hear that its parent is gone.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        _leave()

    def _has_news(self) -> bool:
        """Wait until there is something to read, the end of the file included; false when the parent is another one.

        What the parent forked and didn't exec (`multiprocessing` does) holds the pipe open, and the file has no end while that lives.
        """
        news = select.poll()
        news.register(self._in, select.POLLIN)
        while not news.poll(1e3 * _PARENT_S):
            if os.getppid() != self._parent:
                return False
        return True


def _leave() -> NoReturn:
    """End now, the parent is gone: nobody wants an answer, and a step that runs must not keep the device."""
    os._exit(0)


def serve(engine: Engine, pipe: ParentPipe) -> None:
    """Take commands, step, send what there is to say; sleep when there is nothing to do; return when told to close."""
    last = tidied = time.monotonic()
    while True:
        tidied = tidied if engine.has_work else _tidy(tidied)
        for message in pipe.take(wait=not engine.has_work):
            match message:
                case Submit(requests):
                    for request in requests:
                        engine.add(request)
                case Abort(request_ids):
                    for request_id in request_ids:
                        engine.abort(request_id)
                case AskReport(number):
                    pipe.send(Report(number, asdict(engine.stats())))
                case Close():
                    return
                case _:
                    raise EngineError(f"an engine can't be told {type(message).__name__}")
        if not engine.has_work:
            continue
        outputs = engine.step()
        now = time.monotonic()
        if outputs:
            pipe.send(Outputs(tuple(outputs)))
            last = now
        elif now - last >= _TICK_S:
            pipe.send(Tick(engine.stats().steps))
            last = now


def _tidy(tidied: float) -> float:
    """Collect garbage if it is time to; return when that was done last, as `time.monotonic` says it."""
    if time.monotonic() - tidied < _TIDY_S:
        return tidied
    gc.collect()  # a millisecond: what is frozen is not looked at
    return time.monotonic()


def run(pipe: ParentPipe) -> None:
    """Be the rank that the parent's first message says."""
    begin = time.perf_counter()
    # torch is loaded only now, when stdout is out of its reach, and not later: a rank other than 0 hears where to go when rank 0 has
    # loaded it, and a group would start by twice the time that it takes.
    from engine.executor import serve_rank
    from engine.options import EngineOptions

    start = next(pipe.take(wait=True))
    if not isinstance(start, Start):
        raise EngineError(f"the first message must be Start, not {type(start).__name__}")
    configure(start.log_level, style="json", stream=sys.stderr)
    options = EngineOptions.from_dict(start.options)
    _share_cores(options)
    if start.rank == 0:
        _run_engine(options, pipe, begin)
    else:
        serve_rank(options, start.rank, start.size, start.rendezvous)


def _run_engine(options: EngineOptions, pipe: ParentPipe, begin: float) -> None:
    """`begin`: when the imports did, as `time.perf_counter` says it."""
    from engine.engine import Engine
    from engine.executor import make_executor
    from engine.guidance import Guides

    imported = time.perf_counter() - begin
    rendezvous = None
    if options.tp > 1:
        from engine.parallel import Rendezvous

        rendezvous = Rendezvous()
        pipe.send(Meeting(rendezvous.address))
    executor = make_executor(options, rendezvous)
    try:
        engine = Engine(executor, options, guides=Guides(options.model_path))
        garbage.freeze()
        report = executor.report()
        report["ready_s"] = {"import": round(imported, 3), **report["ready_s"]}
        facts: dict[str, Any] = {"device": options.device, "dtype": options.dtype, "tp": options.tp, **report}
        pipe.send(Ready(options.session_len, facts))
        serve(engine, pipe)
    finally:
        executor.close()


def _share_cores(options: EngineOptions) -> None:
    """Give each rank on a CPU its part of the cores: as many threads as cores in every rank stand in each other's way."""
    if options.device == "cpu" and options.tp > 1 and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.tp))


def _failed(error: BaseException) -> Failed:
    if isinstance(error, HeadraceError):
        return Failed(error.code, error.message, error.param)
    if type(error).__name__ == "OutOfMemoryError":
        remedy = "lower cache_max_entry_count, max_batch_size or max_prefill_token_num"
        return Failed(EngineError.code, f"the device has no memory left: {error}; {remedy}")
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Failed(EngineError.code, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")


def main() -> int:
    """Run until the parent closes the pipe or says so; 0, or 1 after a failure that was reported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business: it closes its engine in order
    pipe = ParentPipe()
    try:
        run(pipe)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        pipe.send(_failed(error))
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Not sys.exit: tearing torch and its threads down takes seconds and can hang; nothing here needs it.
    os._exit(status)
