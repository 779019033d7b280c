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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from headrace.completion import Completion
from headrace.config import GenerationConfig, Prompt, PytorchEngineConfig
from headrace.errors import InvalidRequest, ModelLoadError, RankLost, RequestAborted
from worker.recorder import Ledger, Verdict

if TYPE_CHECKING:
    from headrace.settings import Settings

log = logging.getLogger(__name__)

NOT_FINAL: Final = frozenset({RankLost.code, RequestAborted.code, ModelLoadError.code})
"""Error codes that say nothing about the prompt: its row stays open and it is computed again."""


class EngineFrontend(Protocol):
    """What a worker needs of an engine. Made by calling the factory with `(model_path, backend_config=...)`."""

    def submit(
        self,
        prompt: Prompt,
        gen_config: GenerationConfig,
        on_done: Callable[[Completion], None],
        *,
        index: int = 0,
        seed_key: str | None = None,
    ) -> int:
        """Take one prompt and return its handle; `on_done` is called once, from another thread or from this one."""
        ...

    def abort(self, handle: int) -> None:
        """Give up one prompt; no-op when it is done."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Return figures that change while the engine moves."""
        ...

    @property
    def is_alive(self) -> bool:
        """False once the engine has ended for good."""
        ...

    def close(self) -> None:
        """End the engine; may be called twice."""
        ...


def load_frontend(settings: Settings) -> EngineFrontend:
    """Build the engine of `settings` and return when its model is loaded.

    Raise `InvalidRequest` for a setting that is wrong and `ModelLoadError` for a model that can't be loaded.
    """
    module, _, name = settings.engine_frontend.partition(":")
    try:
        config = PytorchEngineConfig.from_dict(json.loads(settings.engine_config))
    except ValueError as error:
        raise InvalidRequest(f"HEADRACE_ENGINE_CONFIG={settings.engine_config!r}: {error}", param="engine_config") from error
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"HEADRACE_ENGINE_FRONTEND={settings.engine_frontend!r} names no class as module:name ({error})"
        raise InvalidRequest(message, param="engine_frontend") from error
    frontend: EngineFrontend = factory(settings.model, backend_config=config)
    return frontend


class Submission:
    """The prompts of one chunk in the engine. Ends when all are done, or with `abort_rest`."""

    def __init__(self, host: EngineHost, ledger: Ledger) -> None:
        self._host = host
        self._ledger = ledger
        self._handles: dict[int, int] = {}
        self._done: set[int] = set()

    def add(self, index: int, prompt: Prompt, config: GenerationConfig, *, seed_key: str) -> None:
        """Submit one prompt; its completion goes to the ledger."""
        self._handles[index] = self._host.frontend.submit(prompt, config, self._take, index=index, seed_key=seed_key)

    def _take(self, completion: Completion) -> None:
        self._done.add(completion.index)
        self._host.count_done()
        if completion.error is not None and completion.error.code in NOT_FINAL:
            self._ledger.settle(Verdict.ENGINE_LOST)
        else:
            self._ledger.add(completion)

    def abort_rest(self) -> None:
        """Take what is not done out of the engine."""
        for index, handle in self._handles.items():
            if index not in self._done:
                self._host.frontend.abort(handle)


class EngineHost:
    """Keeps the engine and watches that it moves."""

    def __init__(self, frontend: EngineFrontend, *, stall_s: float) -> None:
        """After `stall_s` seconds with prompts in it and nothing new in its figures, an engine counts as stuck."""
        self.frontend = frontend
        self._stall_s = stall_s
        self._count_lock = threading.Lock()
        self._inside = 0
        self._done = 0
        self._pulse: object = None
        self._moved_at = time.monotonic()

    @contextmanager
    def submit(
        self, prompts: Iterable[tuple[int, Prompt]], config: GenerationConfig, ledger: Ledger, *, batch_id: str
    ) -> Iterator[Submission]:
        """Submit (index, prompt) pairs; whatever ends the block, nothing of it stays behind in the engine."""
        submission = Submission(self, ledger)
        try:
            for index, prompt in prompts:
                if ledger.verdict is not None:
                    break
                self._count(inside=1)
                # The key makes a prompt that is computed a second time, after a crash, repeat its text.
                submission.add(index, prompt, config, seed_key=f"{batch_id}:{index}")
            yield submission
        finally:
            submission.abort_rest()

    def count_done(self) -> None:
        """Note one completion, whatever became of it."""
        self._count(inside=-1, done=1)

    def _count(self, *, inside: int, done: int = 0) -> None:
        with self._count_lock:
            self._inside += inside
            self._done += done

    @property
    def prompts_inside(self) -> int:
        """Prompts submitted and not done."""
        return self._inside

    def trouble(self) -> str | None:
        """Return why this engine will answer no more, or None while it is well. Asked about once a second."""
        if not self.frontend.is_alive:
            return "the engine has ended for good; its last words are in the log above"
        now = time.monotonic()
        pulse = (self._done, json.dumps(self.frontend.stats(), sort_keys=True, default=str)) if self.prompts_inside else None
        if pulse is None or pulse != self._pulse:
            self._pulse, self._moved_at = pulse, now
        stuck_s = now - self._moved_at
        if stuck_s > self._stall_s:
            return f"the engine has {self.prompts_inside} prompts and made no step for {stuck_s:.0f} s"
        return None

    def close(self) -> None:
        """End the engine."""
        self.frontend.close()
