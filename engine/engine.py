"""The engine's heart: requests in, tokens out, one step at a time.

Knows no device (an `Executor` runs the plans), no text and no process: `engine.rank` feeds it from a pipe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from engine.draft import PlannedStep
from engine.guidance import Guide, Guides, Masking, Row
from engine.plan import Executor, RunningStep, StepOutput
from engine.request import TokenOutput, TokenRequest
from engine.scheduler import Scheduler
from engine.scheduling_options import SchedulingOptions
from engine.sequence import SequenceState
from engine.stats import EngineStats
from headrace.completion import CompletionError, FinishReason, TokenLogprobs
from headrace.errors import (
    HeadraceError,
    InvalidRequest,
    NumericalError,
    OutOfDeviceMemory,
    RequestAborted,
    UnsupportedOption,
)

log = logging.getLogger(__name__)

_MOST_TRIES = 10
_PAUSE_S = 0.1
"""How often, and with what pause, the smallest step is tried: another process may hold the memory for a moment only."""


class _Launched(NamedTuple):
    """A step on the device, and whose tokens it will give."""

    planned: PlannedStep
    running: RunningStep


class _Masked(NamedTuple):
    """Masks under way for the step launched last, and whose they are."""

    masking: Masking
    sequences: list[SequenceState]


class Engine:
    """Runs any number of requests over one executor.

    Not thread-safe: one thread calls `add`, `abort` and `step`. A step that the device has no memory for is put back and tried
    again, smaller. Any other exception out of `step` comes from the executor and leaves the device in an unknown state: let the
    process die; its supervisor starts another one.
    """

    def __init__(
        self,
        executor: Executor,
        options: SchedulingOptions,
        *,
        guides: Guides | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`guides`: without them requests with a response format are refused; `clock`: seconds, for the timings in `TokenOutput`."""
        self._executor = executor
        self._clock = clock
        self._scheduler = Scheduler(
            num_blocks=executor.num_blocks,
            worthwhile_tokens=executor.worthwhile_tokens,
            block_size=options.block_size,
            max_batch_size=options.max_batch_size,
            token_budget=options.max_prefill_token_num,
            prefill_interval=options.prefill_interval,
            enable_prefix_caching=options.enable_prefix_caching,
            session_len=options.session_len,
        )
        self._guides = guides
        # Whether a request with a response format was ever admitted: until then nobody looks for any.
        self._is_guiding = False
        self._live: dict[str, SequenceState] = {}
        # The step whose tokens the host hasn't read, and the masks that it waits for.
        self._previous: _Launched | None = None
        self._masking: _Masked | None = None
        # Reports that belong to no step (refused or aborted requests); the next step() gives them.
        self._reports: list[TokenOutput] = []
        self._steps = 0
        self._steps_put_back = 0
        # How often in a row a step of one token didn't fit.
        self._hopeless = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._computed_tokens = 0
        self._ended = {"stop": 0, "length": 0, "error": 0, "abort": 0}

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything to do or to report."""
        return bool(self._live or self._previous or self._reports or self._is_compiling)

    @property
    def _is_compiling(self) -> bool:
        return self._guides is not None and self._guides.is_compiling

    def add(self, request: TokenRequest) -> None:
        """Queue a request. One that can never run is reported as an error by the next `step()`."""
        assert request.request_id not in self._live, f"request id {request.request_id!r} is in use"
        if request.config.response_format is None:
            self._queue(request, None)
        elif self._guides is None:
            self._refuse(request.request_id, UnsupportedOption("this engine has no grammars", param="response_format"))
        elif self._guides.is_known(request):
            self._queue(request, None)
        else:
            self._guides.start(request)

    def _queue(self, request: TokenRequest, guide: Guide | None) -> None:
        try:
            sequence = self._scheduler.add(request)
        except HeadraceError as error:
            self._refuse(request.request_id, error)
            return
        if guide is not None:
            sequence.guide, sequence.watched = guide, True
        sequence.queued_at = self._clock()
        self._live[request.request_id] = sequence

    def _refuse(self, request_id: str, error: HeadraceError, reason: FinishReason = "error") -> None:
        self._ended[reason] += 1
        self._reports.append(
            TokenOutput(request_id=request_id, token_ids=(), finish_reason=reason, error=CompletionError.of(error))
        )

    def _queue_compiled(self) -> None:
        """Queue the requests whose grammars have become ready; sleep for a moment where nothing else is to be done."""
        assert self._guides is not None, "nobody compiles"
        for request, guide in self._guides.take(patient=not (self._live or self._previous or self._reports)):
            if isinstance(guide, HeadraceError):
                self._refuse(request.request_id, guide)
            else:
                self._is_guiding |= guide is not None
                self._queue(request, guide)

    def abort(self, request_id: str) -> None:
        """End a request now; its blocks are free for the next step. An unknown id has ended already: nothing happens."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._reports.append(self._end(sequence, "abort", error=CompletionError.of(RequestAborted())))
        elif self._guides is not None and self._guides.forget(request_id):
            self._refuse(request_id, RequestAborted(), "abort")

    def step(self) -> list[TokenOutput]:
        """Launch the next step, then read the previous one's tokens while it runs; return what there is to report."""
        if self._is_compiling:
            self._queue_compiled()
        self._choose()
        planned = self._scheduler.plan()
        launched = None if planned is None else self._launch(planned)
        outputs = self._commit(self._previous, launched)
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
            steps_put_back=self._steps_put_back,
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

    def _launch(self, planned: PlannedStep) -> _Launched | None:
        """Start a step; None: the device had no memory for it, and it is put back."""
        try:
            running = self._executor.launch(planned.plan)
        except OutOfDeviceMemory as error:
            self._put_back(planned, error)
            return None
        if self._scheduler.budget.grow():
            log.info("steps are of full size again", extra={"event": "steps_recovered"})
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

    def _commit(self, step: _Launched | None, following: _Launched | None) -> list[TokenOutput]:
        """Read a step's tokens: each belongs to a request that goes on, ends by it, or had ended before it."""
        outputs, self._reports = self._reports, []
        result = None if step is None else step.running.result()
        if self._is_guiding:
            self._guide(step, result, following)
        if step is None or result is None:
            return outputs
        self._hopeless = 0
        invalid, complete, logprobs = result.invalid, result.complete, result.logprobs
        for (sequence, start), scores in zip(step.planned.scored, result.prompt_logprobs, strict=True):
            # By position: what a preemption lets be computed again says the same again.
            if sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs[start : start + len(scores)] = scores
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
            if sequence.watched or token in sequence.stops or len(tokens) == sequence.final or entry in complete:
                report = self._look_at(sequence, logprobs[entry] if logprobs else None, is_complete=entry in complete)
                if report is not None:
                    outputs.append(report)
        return outputs

    def _put_back(self, planned: PlannedStep, error: OutOfDeviceMemory) -> None:
        """Plan the step's work again, in smaller steps; give up a request of which one token doesn't fit in a second."""
        plan, scheduler = planned.plan, self._scheduler
        whose = scheduler.put_back(planned)
        self._steps_put_back += 1
        if scheduler.budget.shrink(plan.num_tokens):
            log.warning(
                "the device had no memory for a step of %d tokens; they are computed again, at most %d a step until it goes well",
                plan.num_tokens,
                scheduler.budget.now,
                extra={
                    "event": "step_put_back",
                    "tokens": plan.num_tokens,
                    "rows": len(plan.rows),
                    "next_tokens": scheduler.budget.now,
                    "error": error.message[:300],
                },
            )
            return
        self._hopeless += 1
        if self._hopeless < _MOST_TRIES:
            time.sleep(_PAUSE_S)
            return
        self._hopeless = 0
        self._reports += [self._end(sequence, "error", error=CompletionError.of(error)) for sequence in whose]

    def _guide(self, step: _Launched | None, result: StepOutput | None, following: _Launched | None) -> None:
        """Go on in the grammars by the tokens just read, and start on what the step that is running may choose."""
        assert self._guides is not None, "a guide that nobody made"
        if step is not None and result is not None:
            read = zip(step.planned.sampled, result.tokens, strict=True)
            self._guides.advance([(one.guide, token) for one, token in read if one.guide is not None and not one.done])
        if following is None:
            return
        indices = (row.output_index for row in following.planned.plan.rows if row.samples)
        guided = [
            (Row(entry, one.guide, index), one)
            for entry, (one, index) in enumerate(zip(following.planned.sampled, indices, strict=True))
            if one.guide is not None
        ]
        if guided:
            going = [(row, one) for row, one in guided if not one.done]
            self._masking = _Masked(self._guides.begin([row for row, _ in going]), [one for _, one in going])

    def _choose(self) -> None:
        """Let the step launched last choose its tokens, where it waits for masks; report who can't go on."""
        masked, self._masking = self._masking, None
        if masked is None:
            return
        assert self._guides is not None, "masks that nobody asked for"
        assert self._previous is not None, "masks for no step"
        try:
            self._executor.choose(self._guides.masks(masked.masking))
        except OutOfDeviceMemory as error:
            planned, self._previous = self._previous.planned, None
            self._put_back(planned, error)
            # It was counted when it was launched.
            self._steps -= 1
            self._computed_tokens -= planned.plan.num_tokens
            return
        broken = [(one, one.guide.error()) for one in masked.sequences if one.guide is not None and not one.done]
        self._reports += [self._end(one, "error", error=why) for one, why in broken if why is not None]

    def _look_at(self, sequence: SequenceState, logprobs: TokenLogprobs | None, *, is_complete: bool) -> TokenOutput | None:
        """Decide whether the token just read ends the request, and what to report of it now."""
        token, request = sequence.tokens[-1], sequence.request
        if sequence.logprobs is not None:
            assert logprobs is not None, "the executor gave no logprobs for a request that asked for them"
            sequence.logprobs.append(logprobs)
        # A stop token at the last allowed position is a stop: the answer is complete.
        if token in sequence.stops and len(sequence.tokens) > sequence.stop_from:
            # What the caller named goes before what the model brings: an end token may be both.
            detail = f"stop_token:{token}" if token in request.stop_ids else "eos"
            return self._end(sequence, "stop", detail=detail, drop_last=True)
        # Where nothing can follow, waiting for the end token would cost a step, and perhaps the limit.
        if is_complete or (sequence.guide is not None and sequence.guide.complete):
            return self._end(sequence, "stop", detail="response_format")
        if len(sequence.tokens) == sequence.final:
            return self._end(sequence, "length", detail=sequence.limit)
        return self._report(sequence) if request.stream else None

    def _fail(self, sequence: SequenceState) -> TokenOutput:
        error: HeadraceError = NumericalError()
        if sequence.request.config.response_format is not None and sequence.request.bad_sequences:
            error = InvalidRequest(
                "bad_words and bad_token_ids leave no token that response_format allows here (or the model produced NaN logits)",
                param="response_format",
            )
        report = self._end(sequence, "error", error=CompletionError.of(error))
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
        # With the first report that there is: one that is stopped from outside, by a stop word, gets no last one.
        prompt_logprobs = None
        if sequence.prompt_logprobs is not None and error is None:
            prompt_logprobs, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), None
        first = start - sequence.num_prompt
        started_at = sequence.started_at
        return TokenOutput(
            request_id=sequence.request.request_id,
            token_ids=tuple(sequence.tokens[start:end]),
            logprobs=None if logprobs is None else tuple(logprobs[first : end - sequence.num_prompt]),
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_detail=stop_detail,
            error=error,
            cached_tokens=sequence.cached_tokens,
            queue_ms=1e3 * ((now if started_at is None else started_at) - sequence.queued_at),
            run_ms=0.0 if started_at is None else 1e3 * (now - started_at),
        )
