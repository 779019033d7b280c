"""The one engine of a worker process, shared by every chunk in flight: their prompts meet in the engine's steps.

The engine is reached through `EngineFrontend`, which `engine.frontend.Frontend` implements. Which class is loaded is a setting
(`HEADRACE_ENGINE_FRONTEND`), read when the worker starts, so that `-A worker.app` (Flower, `celery inspect`) loads no torch.
This module knows neither Celery nor SQL.
"""

from __future__ import annotations

import importlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from headrace.completion import Completion
from headrace.config import GenerationConfig, Prompt, PytorchEngineConfig
from headrace.errors import InvalidRequest, ModelLoadError, RankLost, RequestAborted
from worker.recorder import Ledger, Verdict

if TYPE_CHECKING:
    from headrace.settings import Settings
    from headrace.store import ChunkMessage

log = logging.getLogger(__name__)

AHEAD_S: Final = 2.0
"""For so long the prompts that wait in an engine should last: a worker finds out within a second that there is room for more."""
NOT_FINAL: Final = frozenset({RankLost.code, RequestAborted.code, ModelLoadError.code})
"""Error codes that say nothing about the prompt: its row stays open and it is computed again."""


class EngineFrontend(Protocol):
    """What a worker needs of an engine. Made by calling the class with `(model_path, backend_config=…, on_event=…)`.

    `on_event` is told what happens to the engine, and 'engine_given_up' before the prompts inside are answered with errors.
    """

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
        """Take one prompt and return its handle; `on_done` is called once, from another thread or from this one.

        `do_preprocess=False` continues a text as it is, without a chat template.
        """
        ...

    @property
    def max_running(self) -> int:
        """Prompts that it runs at once; more wait inside."""
        ...

    def abort(self, handle: int) -> None:
        """Give up one prompt; no-op when it is done."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Return figures that change while the engine moves."""
        ...

    def close(self) -> None:
        """End the engine; may be called twice."""
        ...


class Event(Protocol):
    """What an engine says of itself, as `engine.supervisor.EngineEvent`."""

    @property
    def kind(self) -> str:
        """A name, such as 'engine_died'."""
        ...

    @property
    def message(self) -> str:
        """For the operator."""
        ...


def load_frontend(settings: Settings, on_event: Callable[[Event], None]) -> EngineFrontend:
    """Build the engine of `settings` and return when its model is loaded.

    Raise `InvalidRequest` for a setting that is wrong and `ModelLoadError` for a model that can't be loaded.
    """
    module, _, name = settings.engine_frontend.partition(":")
    try:
        config = PytorchEngineConfig.for_batches(json.loads(settings.engine_config))
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"HEADRACE_ENGINE_CONFIG={settings.engine_config!r}: {error}", param="engine_config") from error
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"HEADRACE_ENGINE_FRONTEND={settings.engine_frontend!r} names no class as module:name ({error})"
        raise InvalidRequest(message, param="engine_frontend") from error
    frontend: EngineFrontend = factory(settings.model, backend_config=config, on_event=on_event)
    if not isinstance(getattr(frontend, "max_running", None), int):
        frontend.close()
        message = (
            f"HEADRACE_ENGINE_FRONTEND={settings.engine_frontend!r}: its `max_running` must say how many prompts run at once"
        )
        raise InvalidRequest(message, param="engine_frontend")
    return frontend


class Submission:
    """The prompts of one chunk in the engine. Ends when all are done, or with `abort_rest`."""

    def __init__(self, host: EngineHost, ledger: Ledger) -> None:
        self._host = host
        self._ledger = ledger
        self._handles: dict[int, int] = {}
        self._weights: dict[int, int] = {}
        self._done: set[int] = set()

    def add(self, index: int, prompt: Prompt, config: GenerationConfig, *, seed_key: str, is_raw: bool = False) -> None:
        """Submit one prompt; its completion goes to the ledger."""
        self._weights[index] = config.n
        self._handles[index] = self._host.frontend.submit(
            prompt, config, self._take, index=index, do_preprocess=not is_raw, seed_key=seed_key
        )

    def _take(self, completion: Completion) -> None:
        self._done.add(completion.index)
        self._host.count_done(self._weights[completion.index])
        error = completion.error
        if error is not None and (error.code in NOT_FINAL or self._host.given_up is not None):
            self._ledger.settle(Verdict.ENGINE_LOST)
        else:
            self._ledger.add(completion)

    def abort_rest(self) -> None:
        """Take what is not done out of the engine."""
        for index, handle in self._handles.items():
            if index not in self._done:
                self._host.frontend.abort(handle)


def _nobody_asks() -> None:
    """Nobody waits for room."""


class Pace:
    """How fast a count grows."""

    def __init__(self) -> None:
        """Begin now, at zero."""
        self._count = 0
        self._at = time.monotonic()
        self._per_s = 0.0

    def per_s(self, count: int) -> float:
        """Return by how much the count grew in each second of the last one or more, given what it is now."""
        now = time.monotonic()
        if now - self._at >= 1:
            self._per_s = (count - self._count) / (now - self._at)
            self._count, self._at = count, now
        return self._per_s


class EngineHost:
    """Keeps the engine and watches that it moves, and how much more it can use."""

    # Set once by `load`, or by the constructor's caller.
    frontend: EngineFrontend

    def __init__(self, load: Callable[[Callable[[Event], None]], EngineFrontend], *, stall_s: float) -> None:
        """Load the engine: `load` gets the function that the engine tells its events to.

        An engine with prompts in it whose figures don't change for `stall_s` seconds counts as stuck.
        """
        # The engine's own last message, once it will answer no more. Set on the engine's thread, before prompts fail of it.
        self.given_up: str | None = None
        self._stall_s = stall_s
        self._count_lock = threading.Lock()
        # Prompts, and the sequences that they are to become (`n` of each); prompts that are done.
        self._inside = 0
        self._sequences = 0
        self._done = 0
        self._pace = Pace()
        # What the engine said of itself, lately: (running, waiting).
        self._seen: deque[tuple[int, int]] = deque(maxlen=2)
        # Called, on the engine's thread, when there is room again after `has_room` said no.
        self.on_room: Callable[[], None] = _nobody_asks
        # What was coming then.
        self._refused: int | None = None
        self._seen_done = 0
        self._seen_figures: object = None
        self._moved_at = self._asked_at = time.monotonic()
        self.frontend = load(self._on_event)

    def _on_event(self, event: Event) -> None:
        if event.kind == "engine_given_up":
            self.given_up = event.message

    @contextmanager
    def submit(self, prompts: Sequence[tuple[int, Prompt]], message: ChunkMessage, ledger: Ledger) -> Iterator[Submission]:
        """Submit (index, prompt) pairs of a chunk; whatever ends the block, nothing of it stays behind in the engine."""
        submission = Submission(self, ledger)
        configs = [message.config_of(index) for index, _ in prompts]
        # All of them at once, before the first is done: they take room from now on.
        sent, wide = 0, [config.n for config in configs]
        self._count(inside=len(prompts), sequences=sum(wide))
        try:
            for (index, prompt), config in zip(prompts, configs, strict=True):
                if ledger.verdict is not None:
                    break
                # The key makes a prompt that is computed a second time, after a crash, repeat its text.
                key = f"{message.batch_id}:{index}"
                submission.add(index, prompt, config, seed_key=key, is_raw=message.is_raw)
                sent += 1
            yield submission
        finally:
            self._count(inside=sent - len(prompts), sequences=-sum(wide[sent:]))
            submission.abort_rest()

    def count_done(self, sequences: int = 1) -> None:
        """Note one completion, whatever became of it."""
        self._count(inside=-1, sequences=-sequences, done=sequences)
        refused = self._refused
        if refused is not None and self.has_room(coming=refused):
            self.on_room()

    def _count(self, *, inside: int, sequences: int, done: int = 0) -> None:
        with self._count_lock:
            self._inside += inside
            self._sequences += sequences
            self._done += done

    def has_room(self, *, coming: int) -> bool:
        """Whether the prompts of a chunk more would run soon, where `coming` sequences of others are on their way here.

        What waits in an engine can't go to another worker that has nothing left to do; where nothing waits when a prompt ends, its slot
        is empty until the next chunk is here. So as many wait as end in `AHEAD_S`, and a quarter of those that run, as they may all end
        at once; but never more than run, as all that ended at once would else look like a fast engine.
        """
        runs = self._runs()
        with self._count_lock:
            waits = min(runs, max(AHEAD_S * self._pace.per_s(self._done), runs / 4))
            has_room = self._sequences + coming < runs + waits
            self._refused = None if has_room else coming
        return has_room

    def _runs(self) -> int:
        """Return how many sequences can run: fewer than there are slots for where some wait all the same, for KV blocks."""
        most = self.frontend.max_running
        seen = list(self._seen)
        if len(seen) == 2 and all(waiting for _, waiting in seen):
            return max(1, min(most, max(running for running, _ in seen)))
        return most

    def stats(self) -> dict[str, Any]:
        """Ask the engine for its figures. Called every few seconds, which is how the host knows how many prompts can run."""
        figures = dict(self.frontend.stats())
        if "running" in figures and "waiting" in figures:
            self._seen.append((int(figures["running"]), int(figures["waiting"])))
        return figures

    @property
    def prompts_inside(self) -> int:
        """Prompts submitted and not done."""
        return self._inside

    def trouble(self) -> str | None:
        """Return why this engine will answer no more, or None while it is well. Asked every second or so, by one thread."""
        if self.given_up is not None:
            return self.given_up
        now = time.monotonic()
        if self._inside == 0 or self._done != self._seen_done:
            self._seen_done, self._moved_at = self._done, now
        elif now - max(self._asked_at, self._moved_at) > self._stall_s / 8:
            # Long answers: nothing ends for minutes, but steps are made. Asking costs a round trip to the engine.
            self._asked_at = now
            figures = json.dumps(self.frontend.stats(), sort_keys=True, default=str)
            if figures != self._seen_figures:
                self._seen_figures, self._moved_at = figures, now
        stuck_s = now - self._moved_at
        if stuck_s > self._stall_s:
            return f"The engine has {self._inside} prompts and made no step for {stuck_s:.0f} s"
        return None

    def close(self) -> None:
        """End the engine."""
        self.frontend.close()
