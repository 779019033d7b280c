"""The offline dataset job: prompts from a JSONL file through one engine into a JSONL file, in order, resumable.

The journal beside the output (`OUT.headrace/journal.db`) is an ordinary headrace store with one batch: rows are copied into it once,
chunks of them are claimed, and every answer is committed there before it counts. Killed at any moment and started again,
the job computes what the journal does not have. The output itself is written at the end, in one piece.

Memory holds a window of prompts and answers, whatever the file's size. This module knows no Redis, no HTTP and no SQL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from headrace.batch import Batch, BatchStatus, seconds_left
from headrace.completion import Completion, TokenUsage
from headrace.config import ChatTemplateConfig, EngineConfig, GenerationConfig, Prompt, PytorchEngineConfig
from headrace.dataset import Digest, digest, output_row, read_rows
from headrace.errors import Conflict, EngineError, InvalidRequest
from headrace.store import Claim, Store

CHUNK_ROWS = 256
WINDOW_ROWS = 1024
"""Prompts in the engine at one time: several times what runs in one step, so that long answers never leave it idle."""
FLUSH_ROWS = 64
FLUSH_S = 1.0
LEASE_S = 5.0
"""How long a job that was killed keeps the next one from the chunks it held."""
FOREVER = "36500d"
TEXT_FIELDS = ("model_name", "session_len", "adapters", "quant_policy", "rope_scaling_factor", "use_logn_attn", "dtype")
"""The engine's fields that can change an answer; the others may differ when a job is resumed (a smaller pool, another device)."""


class JobEngine(Protocol):
    """What the job needs of an engine; `on_done` is called on any thread."""

    def submit(
        self,
        prompt: Prompt,
        gen_config: GenerationConfig,
        on_done: Callable[[Completion], None],
        *,
        index: int = 0,
        seed_key: str | None = None,
    ) -> int:
        """Compute one prompt. A bad prompt's completion has an error; nothing is raised for it."""
        ...

    def close(self) -> None:
        """Stop the engine."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a caller asks for. Input, model, gen_config, template and `TEXT_FIELDS` together are the job's identity."""

    input: Path
    output: Path
    model: str
    gen_config: GenerationConfig = field(default_factory=GenerationConfig)
    engine_config: EngineConfig = field(default_factory=PytorchEngineConfig)
    chat_template_config: ChatTemplateConfig | None = None
    restart: bool = False
    """Throw away what an earlier job for this output computed."""

    @property
    def journal_dir(self) -> Path:
        """Where what was computed is kept until the output is written, and after."""
        return self.output.with_name(self.output.name + ".headrace")

    def identity(self, content: Digest) -> dict[str, str]:
        """Return what must be the same for a resumed job, part by part."""
        engine = {name: value for name, value in self.engine_config.to_dict().items() if name in TEXT_FIELDS}
        template = None if self.chat_template_config is None else self.chat_template_config.to_dict()
        return {
            "input": f"{content.rows} rows, sha256 {content.sha256[:16]}",
            "model": self.model[-512:],
            "gen_config": _brief(self.gen_config.to_dict()),
            "engine_config": _brief(engine),
            "chat_template": _brief(template),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """A moment of a job; rates are those of this run."""

    total: int
    done: int
    failed: int
    resumed: int
    """Rows of `done` that an earlier run computed."""
    running: int
    """Rows that are begun and not done, as far as is seen."""
    usage: TokenUsage
    """Of this run."""
    elapsed_s: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second."""
        return self.usage.completion_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the rate so far; None before the first row."""
        return seconds_left(self.elapsed_s, done=self.done - self.resumed, running=self.running, left=self.total - self.done)


class Failures(NamedTuple):
    """The rows that failed with one code."""

    rows: int
    line: int
    """Where the first of them stands in the input, from 1."""
    message: str
    """What the first of them was told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What came of it."""

    progress: JobProgress
    batch: Batch
    """The journal's batch: counts and tokens of all runs together."""
    failures: Mapping[str, Failures]
    """By error code, in the order of the rows."""


def run_job(
    spec: JobSpec,
    open_engine: Callable[[], JobEngine],
    *,
    report: Callable[[JobProgress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> JobResult:
    """Compute what is missing and write the output.

    `open_engine` is called only when something is missing. `report` gets a `JobProgress` about once a second, `say` a line when
    something worth knowing happens. Raise `NotFound` for a missing input, `InvalidRequest` for one without rows, and `Conflict`
    when the journal is another job's or another process works on it.
    """
    content = digest(spec.input)
    if not content.rows:
        raise InvalidRequest(f"{spec.input} has no rows; nothing to do", param="input")
    with _journal(spec) as store:
        batch = _find(store, spec, spec.identity(content))
        if batch is None:
            say(f"reading {spec.input}: {content.rows} rows")
            batch = _copy(store, spec, spec.identity(content))
        else:
            say(f"{batch.counts.done} of {batch.counts.total} rows are in {spec.journal_dir} already")
        progress = _compute(store, batch, spec, open_engine, report)
        batch = store.get_batch(batch.id)
        failures = write_output(spec, store.stream_results(batch.id))
        return JobResult(progress=progress, batch=batch, failures=failures)


def _compute(
    store: Store, batch: Batch, spec: JobSpec, open_engine: Callable[[], JobEngine], report: Callable[[JobProgress], None]
) -> JobProgress:
    waiting = _Run(store, batch, spec, report).progress(batch)
    # Before the model is loaded, which takes a while: how much there is to do is known already.
    report(waiting)
    if batch.status.is_terminal:
        return waiting
    engine = open_engine()
    try:
        # Made only now: loading the model is not part of the rate.
        run = _Run(store, batch, spec, report)
        run.compute(engine)
        return run.progress(store.get_batch(batch.id))
    finally:
        engine.close()


class _Run:
    """One process's share of a job."""

    def __init__(self, store: Store, batch: Batch, spec: JobSpec, report: Callable[[JobProgress], None]) -> None:
        self._store = store
        self._batch = batch
        self._spec = spec
        self._report = report
        self._started = time.monotonic()
        self._resumed = batch.counts.done
        self._usage_before = batch.usage
        # Filled by the engine's thread.
        self._answers: queue.SimpleQueue[tuple[Claim, Completion]] = queue.SimpleQueue()
        # Rows of each held chunk that are not committed yet.
        self._open: dict[Claim, int] = {}
        self._in_engine = 0
        self._worker = f"job@{socket.gethostname()}#{os.getpid()}"

    def compute(self, engine: JobEngine) -> None:
        """Compute until every row is committed: a second round is for chunks that a killed job held during the first."""
        try:
            while not self._store.get_batch(self._batch.id).status.is_terminal:
                self._round(engine)
        finally:
            for claim in list(self._open):
                self._store.release_chunk(claim)
        self._report(self.progress(self._store.get_batch(self._batch.id)))

    def _round(self, engine: JobEngine) -> None:
        """Feed the engine and commit what comes back until there is no chunk left that can be claimed."""
        feed = self._prompts()
        exhausted = False
        renewed = reported = time.monotonic()
        while not exhausted or self._in_engine:
            # Long prompts take long to feed; a lease that ran out meanwhile would have this job compute its own chunk twice.
            while not exhausted and self._in_engine < WINDOW_ROWS and time.monotonic() - renewed <= LEASE_S / 3:
                item = next(feed, None)
                if item is None:
                    exhausted = True
                else:
                    self._submit(engine, *item)
            self._commit(self._collect())
            now = time.monotonic()
            if now - renewed > LEASE_S / 3:
                self._store.renew(list(self._open), LEASE_S)
                renewed = now
            if now - reported >= 1.0:
                self._report(self.progress(self._store.get_batch(self._batch.id)))
                reported = now

    def progress(self, batch: Batch) -> JobProgress:
        """Say where the job stands."""
        before, now = self._usage_before, batch.usage
        return JobProgress(
            total=batch.counts.total,
            done=batch.counts.done,
            failed=batch.counts.failed,
            resumed=self._resumed,
            running=batch.running,
            usage=TokenUsage(
                prompt_tokens=now.prompt_tokens - before.prompt_tokens,
                cached_tokens=now.cached_tokens - before.cached_tokens,
                completion_tokens=now.completion_tokens - before.completion_tokens,
            ),
            elapsed_s=time.monotonic() - self._started,
        )

    def _prompts(self) -> Iterator[tuple[Claim, int, Prompt]]:
        """Claim chunk after chunk and yield what they lack; wait only when there is nothing to collect meanwhile."""
        while not self._store.get_batch(self._batch.id).status.is_terminal:
            refs = self._store.next_chunks(model=self._spec.model, limit=1, grace_s=0)
            claim = self._store.claim_chunk(refs[0].chunk_id, worker=self._worker, lease_s=LEASE_S) if refs else None
            if claim is None:
                if self._in_engine:
                    return
                time.sleep(0.2)
                continue
            pending = self._store.pending(claim)
            self._open[claim] = len(pending)
            if not pending:
                self._finish(claim)
            for item in pending:
                yield claim, item.index, item.prompt

    def _submit(self, engine: JobEngine, claim: Claim, index: int, prompt: Prompt) -> None:
        self._in_engine += 1
        # The key makes a row that is computed again draw the same random numbers, so that a resumed job repeats its text.
        key = f"{self._batch.id}:{index}"
        engine.submit(prompt, self._spec.gen_config, lambda done: self._answers.put((claim, done)), index=index, seed_key=key)

    def _collect(self) -> dict[Claim, list[Completion]]:
        """Take what is answered, at most `FLUSH_ROWS`, waiting at most `FLUSH_S`."""
        found: dict[Claim, list[Completion]] = {}
        deadline = time.monotonic() + FLUSH_S
        for _ in range(min(FLUSH_ROWS, self._in_engine)):
            try:
                claim, completion = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if completion.error is not None and completion.error.code in (
                "rank_lost",
                "aborted",
                "engine_error",
                "model_load_error",
            ):
                # The engine's end is no answer to a prompt: what is committed stays, the rest is computed by the next run.
                raise EngineError(
                    f"the engine ended: {completion.error.message}. Start the same command again: it goes on where it stopped"
                )
            found.setdefault(claim, []).append(completion)
            self._in_engine -= 1
        return found

    def _commit(self, found: Mapping[Claim, list[Completion]]) -> None:
        for result in self._store.record_many(list(found.items())):
            claim = result.claim
            if not result.is_held:
                self._open.pop(claim, None)
                continue
            self._open[claim] -= len(found[claim])
            if not self._open[claim]:
                self._finish(claim)

    def _finish(self, claim: Claim) -> None:
        self._store.finish_chunk(claim)
        del self._open[claim]


@contextlib.contextmanager
def _journal(spec: JobSpec) -> Iterator[Store]:
    folder = spec.journal_dir
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(f"another process works on {spec.output}; wait for it or choose another output") from None
        if spec.restart:
            for file in folder.glob("journal.db*"):
                file.unlink()
        store = Store(f"sqlite:///{folder.absolute()}/journal.db", create=True)
        try:
            yield store
        finally:
            store.close()


def _find(store: Store, spec: JobSpec, identity: dict[str, str]) -> Batch | None:
    """Return the journal's batch when it is this job's, None when there is none; raise `Conflict` when it is another job's."""
    for batch in store.list_batches(limit=10):
        if batch.status in (BatchStatus.VALIDATING, BatchStatus.FAILED, BatchStatus.CANCELLED):
            continue  # an earlier run was killed while it copied the rows; nothing of it was computed
        before = batch.metadata
        changed = [
            f"{name} (was {before.get(name)}, is {value})" for name, value in identity.items() if before.get(name) != value
        ]
        if changed:
            raise Conflict(
                f"{spec.journal_dir} belongs to another job for this output; different: {'; '.join(changed)}. Give the same "
                "input and options to go on with it, another output to keep it, or --restart to throw it away"
            )
        return batch
    return None


def _copy(store: Store, spec: JobSpec, identity: dict[str, str]) -> Batch:
    """Copy the rows into the journal; a bad row is recorded as its own error at once."""
    prompts = (row.prompt for row in read_rows(spec.input))
    return store.create_batch(
        prompts,
        spec.gen_config,
        model=spec.model,
        chunk_size=CHUNK_ROWS,
        metadata=identity,
        completion_window=FOREVER,
        endpoint="job",
    )


def write_output(spec: JobSpec, completions: Iterator[Completion]) -> dict[str, Failures]:
    """Write one line for each row, in the input's order, and put the file in its place in one step; return what failed."""
    failures: dict[str, Failures] = {}
    scratch = spec.output.with_name(f".{spec.output.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            for row, completion in zip(read_rows(spec.input), completions, strict=True):
                _write_line(file, completion, row.custom_id)
                if (error := completion.error) is not None:
                    first = failures.get(error.code, Failures(0, row.line, error.message))
                    failures[error.code] = first._replace(rows=first.rows + 1)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(spec.output)
    finally:
        scratch.unlink(missing_ok=True)
    return failures


def _write_line(file: IO[str], completion: Completion, custom_id: str | None) -> None:
    file.write(json.dumps(output_row(completion, custom_id), ensure_ascii=False) + "\n")


def _brief(value: Any) -> str:
    """Return JSON that fits a metadata value, made distinct by a hash where it is cut."""
    import hashlib

    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:150]}… sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
