"""The batch: its states, the arrows between them, and the frozen value that every room passes around.

States are those of the OpenAI Batch API. `ARROWS` is the one table of allowed transitions: the store enforces it inside the
UPDATE that changes a state, `docs/lifecycle.md` draws it, and a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple

from headrace.completion import CompletionError, TokenUsage
from headrace.config import GenerationConfig, Prompt
from headrace.errors import InvalidRequest, NotFound

WINDOW: Final = r"([1-9][0-9]{0,5})([smhd])"
"""What a completion window looks like."""
_UNIT_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class BatchStatus(StrEnum):
    """Where a batch stands."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing will change any more."""
        return not ARROWS[self]


_S = BatchStatus
ARROWS: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    _S.VALIDATING: frozenset({_S.IN_PROGRESS, _S.FAILED, _S.CANCELLING, _S.EXPIRED}),
    _S.IN_PROGRESS: frozenset({_S.FINALIZING, _S.CANCELLING, _S.EXPIRED}),
    _S.FINALIZING: frozenset({_S.COMPLETED, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.CANCELLED: frozenset(),
}
"""From a state to the states it may change to."""


def sources(target: BatchStatus) -> frozenset[BatchStatus]:
    """Return the states from which `target` may be reached in one arrow."""
    return frozenset(state for state, targets in ARROWS.items() if target in targets)


@dataclass(frozen=True, slots=True)
class Item:
    """One element of a batch that is more than its prompt."""

    prompt: Prompt | CompletionError
    """The prompt, or why it can't be answered."""
    gen_config: GenerationConfig | None = None
    """None: the batch's."""
    custom_id: str | None = None
    """What its sender calls it."""


CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
ROWS: Final = "/v1/batches"
"""Endpoint of prompts that came in the request, or in a file of plain rows; the two above are OpenAI's."""
OutputKind = Literal["output", "errors"]
"""The two files that a batch's completions make: the answers, and the errors."""
OUTPUT_KINDS: Final[tuple[OutputKind, ...]] = ("output", "errors")


def has_output_files(endpoint: str) -> bool:
    """Whether batches of this endpoint have output files: they are in OpenAI's formats."""
    return endpoint in (CHAT, TEXT)


def output_file_id(batch_id: str, kind: OutputKind) -> str:
    """Return the id of a batch's output or error file."""
    return f"file-{batch_id.removeprefix('batch_')}-{kind}"


class OutputRow(NamedTuple):
    """A completion as it is stored."""

    position: int
    custom_id: str | None
    error_code: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    recorded_at: float
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """Prompts of a batch. `completed` and `failed` grow to `total` together."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def done(self) -> int:
        """Prompts that have their answer or their error."""
        return self.completed + self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A snapshot of one batch. Times are Unix seconds (UTC) of the database's clock; None: not yet."""

    id: str
    """'batch_' and 32 hex digits."""
    model: str
    gen_config: GenerationConfig
    status: BatchStatus
    counts: RequestCounts
    usage: TokenUsage
    created_at: float
    begun: int = 0
    """Prompts that workers are seen to have begun with, those that are done included; 0 where a worker of before doesn't say."""
    expires_at: float | None = None
    started_at: float | None = None
    """When a worker first claimed a chunk of it."""
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    updated_at: float | None = None
    """When a row of it was last recorded."""
    endpoint: str = ROWS
    completion_window: str = "24h"
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    """Higher is served first."""
    errors: tuple[Mapping[str, Any], ...] = ()
    input_file_id: str | None = None
    """The file that its prompts were read from; None: they came in the request."""

    def file_id(self, kind: OutputKind) -> str | None:
        """Return the id of the output or error file; None while the batch isn't over, and where no line would be in it."""
        count = self.counts.completed if kind == "output" else self.counts.failed
        if not has_output_files(self.endpoint) or not self.status.is_terminal or count == 0:
            return None
        return output_file_id(self.id, kind)

    @property
    def progress(self) -> float:
        """Fraction of the prompts that have their answer or their error, 0..1."""
        if not self.counts.total:
            # Being stored, or over before anything was.
            return float(self.status.is_terminal)
        return self.counts.done / self.counts.total

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens a second between the first claim and the last recorded row; None before there is a row."""
        seconds = self._busy_s
        return self.usage.completion_tokens / seconds if seconds else None

    @property
    def eta_s(self) -> float | None:
        """Seconds of work left at the rate so far, seen from `updated_at`; 0 when terminal, None before there is a row."""
        if self.status.is_terminal:
            return 0.0
        seconds, done = self._busy_s, self.counts.done
        return seconds_left(seconds, done=done, running=self.running, left=self.counts.total - done) if seconds else None

    @property
    def running(self) -> int:
        """Prompts that are begun and not done, as far as is seen."""
        return max(0, self.begun - self.counts.done)

    @property
    def _busy_s(self) -> float | None:
        if self.started_at is None or self.updated_at is None or self.updated_at <= self.started_at:
            return None
        return self.updated_at - self.started_at


def seconds_left(elapsed_s: float, *, done: int, running: int, left: int) -> float | None:
    """Return how long `left` prompts (those that run among them) take at the rate of `elapsed_s`; None before one is done.

    A prompt that runs counts as half done. Where all run at once, the first that is done has taken nearly as long as the others will:
    by those that are done alone, a hundred would take a hundred times as long. Where few run at once they soon count for nothing.
    """
    return elapsed_s * left / (done + running / 2) if done else None


def no_such_batch(batch_id: str) -> NotFound:
    """Return the error for a batch that is not there: the same words whether it never was, was deleted, or is another's."""
    return NotFound(f"There is no batch {batch_id[:80]!r}; GET /v1/batches lists those that exist", param="batch_id")


def window_seconds(text: str) -> float:
    """Return the length of a completion window such as '24h', '30m', '7d' or '90s'; raise `InvalidRequest` for other forms."""
    match = re.fullmatch(WINDOW, text)
    if match is None:
        raise InvalidRequest(
            f"completion_window must be a number and s, m, h or d, such as '24h', not {text!r}", param="completion_window"
        )
    return int(match[1]) * _UNIT_S[match[2]]


def check_window(text: str) -> str:
    """Return a completion window that has the right form; raise `InvalidRequest`."""
    window_seconds(text)
    return text
