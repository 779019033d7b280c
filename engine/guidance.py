"""Where each running request stands in its grammar, and which tokens it may choose next. Host only: no device, no scheduling.

A step whose rows follow a grammar is launched in two parts. Its forward pass needs no more than any other step: the tokens of
the step before are in the state table, on the device. While it runs, the host reads those tokens, moves each grammar on by
one, and computes the masks of all rows on threads that don't hold the interpreter lock; then the sampling is launched with
them. So the device waits for a grammar only where its masks take longer than the whole forward pass.

A grammar is compiled on a thread of its own: a large one takes seconds, and everybody else's steps must go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.grammar import Grammars
from engine.request import TokenRequest
from engine.token_masks import TokenMasks
from headrace.completion import CompletionError
from headrace.errors import EngineError, HeadraceError, InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_WORDS = npt.NDArray[np.int32]
_MOST_THREADS = 16
_PATIENCE_S = 0.05


class Guide:
    """One request's place in its grammar. Made by `Guides.take`."""

    __slots__ = ("_ends_W", "_eos_W", "_min_new_tokens", "matcher")

    def __init__(self, matcher: LLMatcher, request: TokenRequest, width: int) -> None:
        self.matcher = matcher
        # These come only where the answer is complete; the caller's own stop tokens also where the grammar writes them.
        self._eos_W = _bits(request.eos_ids, width)
        self._ends_W = self._eos_W | _bits(request.stop_ids, width)
        self._min_new_tokens = request.config.min_new_tokens

    def accept(self, token: int) -> bool:
        """Go one token on; true when the answer is complete and nothing can follow it."""
        matcher = self.matcher
        return matcher.consume_token(token) and matcher.is_stopped() and not matcher.is_error()

    def error(self) -> CompletionError | None:
        """Say why the request can't go on, after its mask was computed."""
        if not self.matcher.is_error():
            return None
        why = " ".join(self.matcher.get_error().split())[:300]
        return CompletionError.of(
            InvalidRequest(f"response_format can't be followed any further: {why}", param="response_format")
        )

    def refine(self, mask_W: _WORDS, *, may_end: bool, generated: int) -> None:
        """Put the request's own ends into a mask, in place: they come only where the grammar is complete."""
        if may_end:
            mask_W |= self._ends_W
        else:
            mask_W &= ~self._eos_W
        if generated < self._min_new_tokens:
            others_W = mask_W & ~self._ends_W
            # Where nothing else can come, min_new_tokens can't be had: the end is better than no answer.
            if others_W.any():
                mask_W[:] = others_W


class Waiting(NamedTuple):
    """A request whose grammar is being compiled."""

    request: TokenRequest
    ready: Future[Any]


class Row(NamedTuple):
    """One row of a step that follows a grammar."""

    entry: int
    """As `StepOutput` counts the sampling rows."""
    guide: Guide
    generated: int


class Guides:
    """The grammars of one engine's requests. Used by the engine's thread only."""

    def __init__(self, model_path: Path | str) -> None:
        """Read nothing yet: the tokenizer is loaded for the first request with a response format."""
        self._model_path = model_path
        self._grammars: Grammars | None = None
        self._compiler: ThreadPoolExecutor | None = None
        self._masker: LLExecutor | None = None
        self._waiting: dict[str, Waiting] = {}

    def start(self, request: TokenRequest) -> None:
        """Begin to compile a request's format."""
        if self._compiler is None:
            self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._waiting[request.request_id] = Waiting(request, self._compiler.submit(self._make, request))

    @property
    def is_compiling(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._waiting)

    def forget(self, request_id: str) -> bool:
        """Drop a request that waits; false: there is none of this id."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.ready.cancel()
        return waiting is not None

    def take(self, *, patient: bool) -> Iterator[tuple[TokenRequest, Guide | HeadraceError]]:
        """Give the requests whose grammars are ready, in the order of `start`. `patient`: there is nothing else to do."""
        if patient:
            wait([next(iter(self._waiting.values())).ready], timeout=_PATIENCE_S)
        # In order: a request never overtakes an earlier one that waits for the same thread.
        for request_id, (request, ready) in list(self._waiting.items()):
            if not ready.done():
                return
            del self._waiting[request_id]
            error = ready.exception()
            if error is None:
                yield request, ready.result()
            else:
                known = error if isinstance(error, HeadraceError) else EngineError(f"a grammar can't be compiled: {error!r}")
                yield request, known

    def masks(self, rows: Sequence[Row]) -> TokenMasks:
        """Compute what each row may choose next; a row whose `guide.error()` is set afterwards has a mask that means nothing."""
        grammars = self._grammars
        assert grammars is not None, "masks for requests that were never started"
        if self._masker is None:
            from llguidance import LLExecutor

            cores = len(os.sched_getaffinity(0))
            self._masker = LLExecutor(max(1, min(_MOST_THREADS, cores - 1)))
        words_qW = np.zeros((len(rows), grammars.width), dtype=np.int32)
        wanted = [(row.guide.matcher, number) for number, row in enumerate(rows)]
        if wanted:  # all rows may belong to requests that have ended
            self._masker.unsafe_compute_mask_ptr(wanted, words_qW.ctypes.data, words_qW.strides[0], len(rows))
        end = grammars.end_id
        may_end_q = (words_qW[:, end >> 5] >> (end & 31)) & 1
        # The request knows its ends; a tokenizer without one has been given some token in its place.
        words_qW &= ~_bits((end,), grammars.width)
        for row, mask_W, may_end in zip(rows, words_qW, may_end_q.tolist(), strict=True):
            row.guide.refine(mask_W, may_end=bool(may_end), generated=row.generated)
        return TokenMasks(tuple(row.entry for row in rows), words_qW)

    def _make(self, request: TokenRequest) -> Guide:
        """Run on the compiler's thread."""
        if self._grammars is None:
            self._grammars = Grammars.of_model(self._model_path)
        wanted = request.config.response_format
        assert wanted is not None, "a request without a format has no guide"
        return Guide(self._grammars.matcher(wanted), request, self._grammars.width)


def _bits(ids: Sequence[int], width: int) -> _WORDS:
    bits_W = np.zeros(width, dtype=np.uint32)
    for token in ids:
        if token < 32 * width:
            bits_W[token >> 5] |= np.uint32(1 << (token & 31))
    return bits_W.view(np.int32)
