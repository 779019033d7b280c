"""The engine's heart: requests in, tokens out, one step at a time.

Knows no device (an `Executor` runs the plans), no text and no process: `engine.rank` feeds it from a pipe.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from engine.draft import PlannedStep
from engine.plan import Executor, RunningStep
from engine.request import TokenOutput, TokenRequest
from engine.scheduler import Scheduler
from engine.sequence import SequenceState
from engine.stats import EngineStats
from headrace.completion import CompletionError, FinishReason, TokenLogprobs
from headrace.errors import HeadraceError, NumericalError, RequestAborted


class SchedulingOptions(Protocol):
    """What the engine reads of `EngineOptions`."""

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        ...

    @property
    def max_batch_size(self) -> int:
        """Most requests that run at once."""
        ...

    @property
    def max_prefill_token_num(self) -> int:
        """Most tokens that one step computes."""
        ...

    @property
    def prefill_interval(self) -> int:
        """Most steps between two admissions while prompts wait and could be admitted."""
        ...

    @property
    def enable_prefix_caching(self) -> bool:
        """Whether equal prefixes share KV blocks."""
        ...

    @property
    def session_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        ...


class _Launched(NamedTuple):
    """A step on the device, and whose tokens it will give."""

    planned: PlannedStep
    running: RunningStep


class Engine:
    """Runs any number of requests over one executor.

    Not thread-safe: one thread calls `add`, `abort` and `step`. An exception out of `step` comes from the executor and
    leaves the device in an unknown state: let the process die; its supervisor starts another one.
    """

    def __init__(
        self, executor: Executor, options: SchedulingOptions, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`clock`: seconds, for the timings in `TokenOutput`."""
        self._executor = executor
        self._clock = clock
        self._scheduler = Scheduler(
            num_blocks=executor.num_blocks,
            block_size=options.block_size,
            max_batch_size=options.max_batch_size,
            token_budget=options.max_prefill_token_num,
            prefill_interval=options.prefill_interval,
            enable_prefix_caching=options.enable_prefix_caching,
            session_len=options.session_len,
        )
        self._live: dict[str, SequenceState] = {}
        # The step whose tokens the host hasn't read.
        self._previous: _Launched | None = None
        # Reports that belong to no step (refused or aborted requests); the next step() gives them.
        self._reports: list[TokenOutput] = []
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._computed_tokens = 0
        self._ended = {"stop": 0, "length": 0, "error": 0, "abort": 0}

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything to do or to report."""
        return bool(self._live or self._previous or self._reports)

    def add(self, request: TokenRequest) -> None:
        """Queue a request. One that can never run is reported as an error by the next `step()`."""
        assert request.request_id not in self._live, f"request id {request.request_id!r} is in use"
        try:
            sequence = self._scheduler.add(request)
        except HeadraceError as error:
            self._ended["error"] += 1
            self._reports.append(
                TokenOutput(request_id=request.request_id, token_ids=(), finish_reason="error", error=CompletionError.of(error))
            )
            return
        sequence.queued_at = self._clock()
        self._live[request.request_id] = sequence

    def abort(self, request_id: str) -> None:
        """End a request now; its blocks are free for the next step. An unknown id has ended already: nothing happens."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._reports.append(self._end(sequence, "abort", error=CompletionError.of(RequestAborted())))

    def step(self) -> list[TokenOutput]:
        """Launch the next step, then read the previous one's tokens while it runs; return what there is to report."""
        planned = self._scheduler.plan()
        launched = None if planned is None else self._launch(planned)
        outputs = self._commit(self._previous)
        self._previous = launched
        if not self.has_work:
            self.check_integrity()
        return outputs

    def stats(self) -> EngineStats:
        """Return a moment's state and the sums so far."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_used=pool.num_used,
            blocks_total=pool.num_blocks,
            blocks_cached=pool.num_idle,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            computed_tokens=self._computed_tokens,
            preemptions=scheduler.preemptions,
            finished=self._ended["stop"] + self._ended["length"],
            failed=self._ended["error"],
            aborted=self._ended["abort"],
        )

    def check_integrity(self) -> None:
        """Compare everything that is counted twice. AssertionError: a bug of ours."""
        self._scheduler.check_integrity()
        if not self.has_work:
            stats = self.stats()
            assert stats.running == stats.waiting == stats.blocks_used == 0, "an idle engine holds something"

    def _launch(self, planned: PlannedStep) -> _Launched:
        running = self._executor.launch(planned.plan)
        self._steps += 1
        self._computed_tokens += planned.plan.num_tokens
        if planned.admitted:
            now = self._clock()
            for sequence in planned.admitted:
                if sequence.started_at is None:
                    sequence.started_at = now
                    if sequence.forked:
                        continue
                    self._prompt_tokens += sequence.num_prompt
                    self._cached_tokens += sequence.cached_tokens
        return _Launched(planned, running)

    def _commit(self, step: _Launched | None) -> list[TokenOutput]:
        """Read a step's tokens: each belongs to a request that goes on, ends by it, or had ended before it."""
        outputs, self._reports = self._reports, []
        if step is None:
            return outputs
        result = step.running.result()
        invalid, logprobs = result.invalid, result.logprobs
        for entry, (sequence, token) in enumerate(zip(step.planned.sampled, result.tokens, strict=True)):
            # Launched before the host knew that the previous token was the last one.
            if sequence.done:
                continue
            if entry in invalid:
                outputs.append(self._fail(sequence))
                continue
            tokens = sequence.tokens
            tokens.append(token)
            self._generated_tokens += 1
            if sequence.watched or token in sequence.stops or len(tokens) == sequence.final:
                report = self._look_at(sequence, logprobs[entry] if logprobs else None)
                if report is not None:
                    outputs.append(report)
        return outputs

    def _look_at(self, sequence: SequenceState, logprobs: TokenLogprobs | None) -> TokenOutput | None:
        """Decide whether the token just read ends the request, and what to report of it now."""
        token, request = sequence.tokens[-1], sequence.request
        if sequence.logprobs is not None:
            assert logprobs is not None, "the executor gave no logprobs for a request that asked for them"
            sequence.logprobs.append(logprobs)
        # A stop token at the last allowed position is a stop: the answer is complete.
        if token in sequence.stops and len(sequence.tokens) > sequence.stop_from:
            detail = "eos" if token in request.eos_ids else f"stop_token:{token}"
            return self._end(sequence, "stop", detail=detail, drop_last=True)
        if len(sequence.tokens) == sequence.final:
            return self._end(sequence, "length", detail=sequence.limit)
        return self._report(sequence) if request.stream else None

    def _fail(self, sequence: SequenceState) -> TokenOutput:
        report = self._end(sequence, "error", error=CompletionError.of(NumericalError()))
        self._scheduler.distrust(sequence)
        return report

    def _end(
        self,
        sequence: SequenceState,
        reason: FinishReason,
        *,
        detail: str | None = None,
        error: CompletionError | None = None,
        drop_last: bool = False,
    ) -> TokenOutput:
        """Release a request and make its last report."""
        del self._live[sequence.request.request_id]
        self._ended[reason] += 1
        self._scheduler.finish(sequence, completed=error is None)
        return self._report(sequence, finish_reason=reason, stop_detail=detail, error=error, drop_last=drop_last)

    def _report(
        self,
        sequence: SequenceState,
        *,
        finish_reason: FinishReason | None = None,
        stop_detail: str | None = None,
        error: CompletionError | None = None,
        drop_last: bool = False,
    ) -> TokenOutput:
        """Tell the tokens since the last report."""
        now = self._clock()
        start, end = sequence.reported, len(sequence.tokens) - drop_last
        sequence.reported = end
        logprobs = sequence.logprobs
        first = start - sequence.num_prompt
        started_at = sequence.started_at
        return TokenOutput(
            request_id=sequence.request.request_id,
            token_ids=tuple(sequence.tokens[start:end]),
            logprobs=None if logprobs is None else tuple(logprobs[first : end - sequence.num_prompt]),
            finish_reason=finish_reason,
            stop_detail=stop_detail,
            error=error,
            cached_tokens=sequence.cached_tokens,
            queue_ms=1e3 * ((now if started_at is None else started_at) - sequence.queued_at),
            run_ms=0.0 if started_at is None else 1e3 * (now - started_at),
        )
