"""The engine as its users see it: prompts in from any thread, each answered exactly once, whatever becomes of engine processes.

Tokenising happens on the caller's thread, everything else on the supervisor's; what is underscored and mutable here is touched by
that thread only. This module doesn't know batches, SQL or HTTP.

    pending ──window──▶ live (in the engine) ──▶ done
       ▲                  │ the engine dies
       └── quarantine ◀───┘
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from engine.answers import ChoiceBuilder, Delta, Item, make_item, simplest_item
from engine.model_info import ModelInfo
from engine.options import EngineOptions, resolve
from engine.preparation import Preparer
from engine.protocol import Abort, AskReport, Ready, Report, submissions
from engine.quarantine import Quarantine
from engine.request import TokenOutput
from engine.supervisor import EngineEvent, Limits, Supervisor
from engine.templates import choose_template
from engine.tokenizer import Tokenizer
from headrace.completion import Completion, CompletionError
from headrace.config import ChatTemplateConfig, EngineConfig, GenerationConfig
from headrace.errors import EngineError, HeadraceError, InvalidRequest, PoisonPrompt, RequestAborted

log = logging.getLogger(__name__)

_REPORT_TIMEOUT_S = 5.0
OnDone = Callable[[Completion], None]
OnDelta = Callable[[Delta], None]


class _Live(NamedTuple):
    """A request that the engine has."""

    item: Item
    builder: ChoiceBuilder


class Frontend:
    """One model behind one engine (one process for each rank). Thread-safe."""

    def __init__(
        self,
        model_path: str,
        *,
        backend_config: EngineConfig | None = None,
        chat_template_config: ChatTemplateConfig | None = None,
        model_name: str | None = None,
        engine_command: Sequence[str] | None = None,
        limits: Limits | None = None,
        on_event: Callable[[EngineEvent], None] | None = None,
    ) -> None:
        """Start the engine and wait until it is ready.

        Raise `InvalidRequest`/`UnsupportedOption` naming an option, `ModelLoadError`, or `EngineError` with the engine's last words.
        `engine_command` replaces `python -m engine.rank`.
        """
        self.options: EngineOptions = resolve(model_path, backend_config)
        self._info = ModelInfo.read(Path(self.options.model_path))
        self._session_len = self.options.session_len
        self._pid = os.getpid()
        self.max_running = self.options.max_batch_size
        self._window = 2 * self.max_running
        self._handles = itertools.count(1)
        self._numbers = itertools.count(1)
        self._items: dict[int, Item] = {}
        self._pending: deque[Item] = deque()
        self._live: dict[str, _Live] = {}
        self._quarantine: Quarantine[Item] = Quarantine()
        # Set while the engine is asked whether it works at all; an item of nobody's.
        self._proof: Item | None = None
        # A suspect that came through, until the engine has let go of it: the step that runs may be its end yet, and nobody else's.
        self._parting: Item | None = None
        self._last_words = ""
        self._failure: HeadraceError | None = None
        self._facts: dict[str, Any] = {}
        self._engine_stats: dict[str, Any] = {}
        self._reports: dict[int, threading.Event] = {}
        counted = ("prompts_submitted", "prompts_completed", "prompts_failed", "poison_prompts", "engine_deaths")
        self._counts = dict.fromkeys(counted, 0)
        self._supervisor = Supervisor(
            self.options.to_dict(), self, size=self.options.tp, command=engine_command, limits=limits, on_event=on_event
        )
        self._supervisor.start()  # the process loads the model while this one loads the tokenizer
        try:
            tokenizer = Tokenizer(self.options.model_path)
            self._template = choose_template(
                tokenizer, config=chat_template_config, model_name=model_name, engine_model_name=self.options.template_name
            )
            self._supervisor.wait_ready()
        except BaseException:
            self._supervisor.close()
            raise
        self._preparer = Preparer(tokenizer, self._template, self._info, self._session_len, self.options.model_spec().rope)

    # ---- for any thread

    @property
    def info(self) -> ModelInfo:
        """What the model's files say."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._preparer.tokenizer

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks at this moment."""
        return self._supervisor.pids

    @property
    def is_alive(self) -> bool:
        """Whether an engine is ready at this moment."""
        return self._supervisor.is_alive

    @property
    def window(self) -> int:
        """Most requests that are in the engine at once; keep a few times as many submitted and it never starves."""
        return self._window

    def submit(
        self,
        prompt: Any,
        gen_config: GenerationConfig,
        on_done: OnDone,
        *,
        index: int = 0,
        do_preprocess: bool = True,
        on_delta: OnDelta | None = None,
        seed_key: str | None = None,
    ) -> int:
        """Take a prompt; `on_done` is called once with its answer or error, on the frontend's own thread. Returns a handle.

        `seed_key`: names an item of a job; its seed is a hash of `random_seed` and `index`, or of the key where there is none.
        Raise `EngineError` only when the frontend is closed: a bad prompt is an answer with an error.
        """
        handle = next(self._handles)
        try:
            prepared = self._preparer.prepare(
                prompt, gen_config, handle=handle, do_preprocess=do_preprocess, is_streamed=on_delta is not None,
                seed_key=seed_key, index=index,
            )  # fmt: skip
        except Exception as error:
            known = error if isinstance(error, HeadraceError) else InvalidRequest(f"the prompt can't be tokenised: {error!r}")
            if known is not error:
                log.exception("A prompt can't be prepared; it is answered with an error.", extra={"event": "prompt_refused"})
            self._post(partial(self._refuse, on_done, Completion(index=index, error=CompletionError.of(known))))
            return handle
        item = make_item(self._preparer, prepared, gen_config, handle=handle, index=index, on_done=on_done, on_delta=on_delta)
        self._post(partial(self._enqueue, item))
        return handle

    def abort(self, handle: int) -> None:
        """End a prompt with the error 'aborted'; one that is answered already stays answered."""
        self._supervisor.post(partial(self._abort, handle))

    def stats(self) -> dict[str, Any]:
        """Return the engine's counters (the last known ones where it doesn't answer) and this frontend's."""
        number, answered = next(self._numbers), threading.Event()
        if self.is_alive and not self._supervisor.is_own_thread:
            self._reports[number] = answered
            if self._supervisor.post(lambda: self._supervisor.send(AskReport(number))):
                answered.wait(_REPORT_TIMEOUT_S)
            self._reports.pop(number, None)
        queue = {"pending": len(self._pending), "in_engine": len(self._live), "is_alive": self.is_alive}
        return {**self._engine_stats, **self._counts, **queue}

    def report(self) -> dict[str, Any]:
        """Return what runs here and how: model, options, memory, chat template, order of sampling, counters."""
        return {
            "model": self._info.path,
            "architecture": self._info.architecture,
            "session_len": self._session_len,
            "template": self._template.source,
            "stop_words": list(self._template.stop_words),
            "eos_ids": list(self._info.eos_ids),
            "options": self.options.to_dict(),
            "engine": dict(self._facts),
            "sampling_order": "response_format, bad words, logit_bias, repetition_penalty, presence/frequency penalty, min_new_tokens, temperature, "
            "top_k, top_p, min_p, draw",
            "stats": self.stats(),
        }

    def close(self) -> None:
        """Stop the engine; what is unfinished is answered with 'aborted'. May be called twice."""
        self._supervisor.close()

    def _post(self, function: Callable[[], None]) -> None:
        if os.getpid() != self._pid:  # threads don't survive a fork: nobody would ever answer
            raise EngineError("this engine was started by the process that forked this one; make a new one after the fork")
        if not self._supervisor.post(function):
            raise EngineError("this engine is closed; make a new one")

    # ---- on the supervisor's thread: the listener's part

    def on_ready(self, ready: Ready) -> None:
        """Fill the new engine."""
        self._session_len = min(self._session_len, ready.session_len)
        self._facts = ready.facts
        self._fill()

    def on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        """Give the tokens to their choices, answer what is finished, send what there is room for."""
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is not None:  # else it was aborted, or ended by a stop word
                self._take(live, output)
        self._fill()

    def on_report(self, report: Report) -> None:
        """Keep the counters and wake who asked."""
        self._engine_stats = report.stats
        if (event := self._reports.get(report.number)) is not None:
            event.set()

    def on_death(self, error: HeadraceError) -> None:
        """Take everything back; who was inside is tried before anything else runs."""
        self._counts["engine_deaths"] += 1
        self._last_words = error.message
        victims = sorted({live.item for live in self._live.values()} - {self._proof}, key=lambda item: item.handle)
        self._live.clear()
        self._proof = self._parting = None
        for item in victims:
            item.start_over(is_death=True)
        if self._quarantine.is_open:
            self._quarantine.judge(victims)
        elif victims:
            self._quarantine.accuse(victims)
            message = f"{len(victims)} prompts were in the engine that died; they run apart, to find one that kills it."
            self._supervisor.emit(logging.WARNING, "quarantine_opened", message, suspects=len(victims))

    def on_failed(self, error: HeadraceError) -> None:
        """Answer everything with the error, now and from now on."""
        self._failure = error
        self._finish_all(error)

    def on_closed(self) -> None:
        """Answer what is left."""
        self._finish_all(RequestAborted("the engine was closed before the request finished"))

    def is_busy(self) -> bool:
        """Whether the engine owes an answer."""
        return bool(self._live)

    # ---- on the supervisor's thread: the way of an item

    def _refuse(self, on_done: OnDone, completion: Completion) -> None:
        self._counts["prompts_submitted"] += 1
        self._counts["prompts_failed"] += 1
        on_done(completion)

    def _enqueue(self, item: Item) -> None:
        self._counts["prompts_submitted"] += 1
        self._items[item.handle] = item
        if self._failure is not None:
            self._finish(item, CompletionError.of(self._failure))
            return
        self._pending.append(item)
        self._fill()

    def _fill(self) -> None:
        """Send what there is room for; while there are suspects, only them."""
        if not self._supervisor.is_alive:
            return
        while self._quarantine.is_open:
            if self._live:
                return
            self._quarantine.acquit()
            if self._quarantine.awaits_proof:
                self._ask_for_proof()
            else:
                self._send([item for item in self._quarantine.try_next() if not item.is_done])
        chosen, room = [], self._window - len(self._live)
        # An item with more choices than the window goes when nothing else is there.
        while self._pending and (self._pending[0].size <= room or room == self._window):
            item = self._pending.popleft()
            if item.is_done:  # aborted while it waited
                continue
            chosen.append(item)
            room -= item.size
        self._send(chosen)

    def _send(self, items: Iterable[Item]) -> None:
        requests = []
        for item in items:
            item.sent_at = time.monotonic()
            hurries = item is self._quarantine.in_short_trial
            for request, builder in zip(item.requests, item.builders, strict=True):
                if builder.result is None:
                    self._live[request.request_id] = _Live(item, builder)
                    requests.append(replace(request, stream=True) if hurries else request)
        for message in submissions(requests):
            self._supervisor.send(message)

    def _take(self, live: _Live, output: TokenOutput) -> None:
        item, builder = live
        if output.error is None:
            piece = builder.push(output)
            if item.on_delta is not None and (piece.text or piece.token_ids or builder.result):
                self._stream(item.on_delta, item.delta(builder, piece))
        if output.finish_reason is None and builder.result is None:
            if item is self._quarantine.in_short_trial and item is not self._parting and item.has_begun:
                self._acquit(item)
            return
        item.note(output, builder.index)
        del self._live[output.request_id]
        if output.finish_reason is None:  # ended by a stop word: the engine doesn't know yet
            self._supervisor.send(Abort((output.request_id,)))
        if output.error is not None and not (item is self._parting and output.finish_reason == "abort"):
            self._withdraw(item)
            self._finish(item, output.error)
        elif item.size == 0:
            self._finish(item, None)
        elif item is self._parting and not self._live:
            item.start_over(is_death=False)
            self._pending.appendleft(item)

    def _stream(self, on_delta: OnDelta, delta: Delta) -> None:
        try:
            on_delta(delta)
        except Exception:
            log.exception("A reader of a stream failed; its stream goes on.", extra={"event": "callback_failed"})

    def _withdraw(self, item: Item) -> None:
        """Take an item's unfinished requests out of the engine."""
        ids = tuple(request.request_id for request in item.requests if request.request_id in self._live)
        for request_id in ids:
            del self._live[request_id]
        if ids:
            self._supervisor.send(Abort(ids))

    def _abort(self, handle: int) -> None:
        if (item := self._items.get(handle)) is not None:
            self._withdraw(item)
            self._finish(item, CompletionError.of(RequestAborted()))
            self._fill()

    def _acquit(self, item: Item) -> None:
        """Let a suspect go that came as far as its first token, and then the next one in; or everybody, at once."""
        self._supervisor.note_progress()
        if self._quarantine.has_waiting:
            self._parting = item
            self._supervisor.send(Abort(tuple(self._live)))
        else:
            self._quarantine.acquit()

    def _ask_for_proof(self) -> None:
        """Give the engine one token to continue: only an engine that can do that convicts a prompt."""
        self._proof = simplest_item(self._preparer, next(self._handles))
        self._send([self._proof])

    def _convict(self) -> None:
        """Answer those who were alone in engines that died with the error, now that the engine was seen to work."""
        self._proof = None
        self._supervisor.note_progress()
        for item in (guilty for guilty in self._quarantine.prove() if not guilty.is_done):
            self._counts["poison_prompts"] += 1
            message = f"This prompt killed {item.deaths} engines, the last two of them alone; it is set aside."
            self._supervisor.emit(logging.ERROR, "poison_prompt", message, handle=item.handle, deaths=item.deaths)
            self._finish(item, CompletionError.of(PoisonPrompt(f"{message} The last one's words: {self._last_words[-800:]}")))

    def _finish_all(self, error: HeadraceError) -> None:
        self._pending.clear()
        self._live.clear()
        self._proof = None
        self._quarantine.release_all()
        for item in list(self._items.values()):
            self._finish(item, CompletionError.of(error))

    def _finish(self, item: Item, error: CompletionError | None) -> None:
        """Answer an item, once."""
        if item is self._proof:
            self._convict()
            return
        item.is_done = True
        self._quarantine.forget(item)
        del self._items[item.handle]
        self._counts["prompts_failed" if error else "prompts_completed"] += 1
        if error is None:
            self._supervisor.note_progress()
        try:
            item.on_done(item.completion(error))
        except Exception:
            log.exception("An answer's reader failed; the answer may be lost.", extra={"event": "callback_failed"})
