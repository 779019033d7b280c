"""An engine that computes nothing: it answers each prompt with the prompt, after a pause. For tests of everything around an engine.

`ECHO_PAUSE_S` (default 0) is the pause of each prompt; all prompts pause at the same time. `ECHO_LOAD_S`: how long it takes to load.
`ECHO_ANSWERS`: after so many answers it ends for good. `ECHO_MAX_RUNNING`: how many prompts it says it runs at once, though they all do. `ECHO_TALLY`: a file that gets an 's' for each prompt started and an 'a' for
each one answered, whoever kills the process. `ECHO_DIES_ON_SIGUSR2`: when set, that signal ends it for good. A prompt that holds 'REFUSE' fails with `invalid_request`; the usage of a
text is its number of words. An answer has at most `max_new_tokens` words of the prompt; it says 'raw' in place of 'echo' to a text that is to
be continued without a template.
"""

from __future__ import annotations

import heapq
import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from headrace.completion import Choice, Completion, CompletionError, TokenUsage
from headrace.config import EngineConfig, GenerationConfig, Prompt
from headrace.errors import EngineError, ModelLoadError, RequestAborted

REMEMBERED = 10_000
"""Prompts, and aborts, that an engine can be asked about."""


def answer(prompt: Prompt, *, index: int, most: int | None = None, verb: str = "echo") -> Completion:
    """Return what the echo engine says to a prompt."""
    text = prompt if isinstance(prompt, str) else " / ".join(message["content"] for message in prompt)
    if "REFUSE" in text:
        return Completion(index=index, error=CompletionError(code="invalid_request", message="this prompt asks to be refused"))
    words = text.split()
    said = words[:most]
    if len(said) < len(words):
        text = " ".join(said)
    choice = Choice(
        index=0,
        text=f"{verb} {text}",
        token_ids=tuple(range(len(said))),
        finish_reason="stop" if len(said) == len(words) else "length",
        stop_detail="eos" if len(said) == len(words) else "max_new_tokens",
    )
    return Completion(
        index=index, choices=(choice,), usage=TokenUsage(prompt_tokens=len(words), completion_tokens=len(said)), run_ms=1.0
    )


class EchoEvent(NamedTuple):
    """As `engine.supervisor.EngineEvent`."""

    kind: str
    message: str


class EchoFrontend:
    """Has the methods of `worker.host.EngineFrontend`."""

    max_running = int(os.environ.get("ECHO_MAX_RUNNING", "1000000"))

    def __init__(
        self,
        model_path: str,
        *,
        backend_config: EngineConfig | None = None,
        on_event: Callable[[EchoEvent], None] | None = None,
        pause_s: float | None = None,
    ) -> None:
        if model_path == "no-such-model":
            raise ModelLoadError(f"{model_path} is not there")
        time.sleep(float(os.environ.get("ECHO_LOAD_S", "0")))
        self._answers_left = int(os.environ.get("ECHO_ANSWERS", "-1"))
        self.model_path = model_path
        self.backend_config = backend_config
        self._on_event = on_event or (lambda _: None)
        self.pause_s = float(os.environ.get("ECHO_PAUSE_S", "0")) if pause_s is None else pause_s
        # The last of them: with all, a worker's memory would grow with a benchmark's million prompts.
        self.seen: deque[tuple[int, Prompt]] = deque(maxlen=REMEMBERED)
        self.aborted: deque[int] = deque(maxlen=REMEMBERED)
        self.seed_keys: deque[str | None] = deque(maxlen=REMEMBERED)
        self._handles = itertools.count()
        self._changed = threading.Condition()
        self._due: list[tuple[float, int]] = []
        self._open: dict[int, tuple[Completion, int, Callable[[Completion], None]]] = {}
        self._held = False
        self._alive = True
        self._steps = 0
        path = os.environ.get("ECHO_TALLY")
        self._tally = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if path else None
        if "ECHO_DIES_ON_SIGUSR2" in os.environ:
            signal.signal(signal.SIGUSR2, lambda *_: threading.Thread(target=self.die).start())
        self._thread = threading.Thread(target=self._run, name="echo", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt,
        gen_config: GenerationConfig,
        on_done: Callable[[Completion], None],
        *,
        index: int = 0,
        do_preprocess: bool = True,
        seed_key: str | None = None,
    ) -> int:
        assert isinstance(gen_config, GenerationConfig)
        with self._changed:
            handle = next(self._handles)
            self.seen.append((index, prompt))
            self.seed_keys.append(seed_key)
            verb = "echo" if do_preprocess else "raw"
            said = answer(prompt, index=index, most=gen_config.max_new_tokens, verb=verb)
            self._open[handle] = (said, index, on_done)
            heapq.heappush(self._due, (time.monotonic() + self.pause_s, handle))
            self._changed.notify()
        self._note(b"s")
        return handle

    def _note(self, mark: bytes) -> None:
        if self._tally is not None:
            os.write(self._tally, mark)

    def abort(self, handle: int) -> None:
        with self._changed:
            entry = self._open.pop(handle, None)
        if entry is not None:
            self.aborted.append(entry[1])
            entry[2](Completion(index=entry[1], error=CompletionError.of(RequestAborted())))

    def hold(self) -> None:
        """Answer nothing until `release`, like an engine that is stuck."""
        self._held = True

    def release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify()

    def die(self) -> None:
        """End for good, as an engine does that can't be restarted: what is inside fails with `engine_error`."""
        self._alive = False
        self._on_event(EchoEvent("engine_given_up", "The engine is given up after 3 deaths in a row."))
        with self._changed:
            lost, self._open = list(self._open.values()), {}
        for _, index, on_done in lost:
            on_done(Completion(index=index, error=CompletionError.of(EngineError())))

    def stats(self) -> Mapping[str, Any]:
        return {"steps": self._steps}

    def close(self) -> None:
        with self._changed:
            self._alive = False
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def _run(self) -> None:
        while self._alive:
            with self._changed:
                wait_s = self._due[0][0] - time.monotonic() if self._due and not self._held else None
                if wait_s is None or wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                entry = self._open.pop(heapq.heappop(self._due)[1], None)
            if entry is not None:
                if self._answers_left == 0:
                    self._open[-1] = entry
                    self.die()
                    return
                self._answers_left -= 1
                self._steps += 1
                said, _, on_done = entry
                self._note(b"a")
                on_done(said)
