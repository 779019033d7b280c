"""Where each running request stands in its grammar, and which tokens it may choose next. Host only: no device, no scheduling.

A step whose rows follow a grammar is launched in two parts. Its forward pass needs no more than any other step: the tokens of
the step before are in the state table, on the device. While it runs, the host reads those tokens, moves each grammar on by
one (`advance`), and a thread that doesn't hold the interpreter lock computes the masks of all rows (`begin`) while the engine
reports what it read and plans the next step; then the sampling is launched with them. So the device waits for a grammar only
where its masks take longer than the whole forward pass.

A grammar is compiled on a thread of its own: a large one takes seconds, and everybody else's steps must go on.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.grammar import Grammars
from engine.request import TokenRequest
from engine.token_automata import follows_on_device
from engine.token_bytes import token_bytes
from engine.token_masks import TokenMasks
from headrace.completion import CompletionError
from headrace.errors import EngineError, HeadraceError, InvalidRequest
from headrace.response_format import ResponseFormat

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_WORDS = npt.NDArray[np.int32]
_MOST_THREADS = 16
_PATIENCE_S = 0.05
_ROWS_PER_LANE = 8
"""A format gets another lane when each of its lanes has more rows than this: a mask takes some 30 us, a compilation 5 ms and more."""
_LANES_PER_THREAD = 4
"""The library cuts a step's rows into runs for its threads; where a run ends within a lane, two threads wait for each other."""
_COMPILING_S = 1.0
"""Most time that the further lanes of a format may take to compile."""
_KEPT = 64
_NOTHING_FOLLOWS = "NoExtensionBias"
"""The library's word for it."""


class _Format:
    """A response format in use, and its lanes.

    Copies of a matcher share the automaton that they build as they go, which makes them quick, and the lock around it, which
    lets only one of them work at a time. So a format with many rows is compiled several times over: rows of different lanes
    never wait for each other.
    """

    __slots__ = ("growing", "handed_out", "most", "roots", "wanted")

    def __init__(self, wanted: ResponseFormat, root: LLMatcher, most: int) -> None:
        self.wanted = wanted
        self.roots = [root]
        self.most = most
        """Lanes that it may have."""
        self.handed_out = 0
        self.growing: Future[list[LLMatcher]] | None = None

    def next_lane(self) -> int:
        """Return the lanes by turns."""
        self.handed_out += 1
        return self.handed_out % len(self.roots)

    def lacks(self, rows: int) -> int:
        """Return how many more lanes `rows` rows are worth; 0 while some are on their way."""
        return 0 if self.growing else min(-(-rows // _ROWS_PER_LANE), self.most) - len(self.roots)

    def grow(self) -> bool:
        """Take the lanes that have come up since the last call; false: none."""
        if self.growing is None or not self.growing.done():
            return False
        more = self.growing.result()
        self.growing = None
        self.roots += more
        return bool(more)


class Guide:
    """One request's place in its grammar. Made by `Guides.take`."""

    __slots__ = ("complete", "ends", "form", "lane", "matcher", "min_new_tokens", "tokens")

    def __init__(self, form: _Format, request: TokenRequest) -> None:
        self.form = form
        self.tokens: list[int] = []
        self.settle(form.next_lane())
        self.complete = False
        """Whether the answer is complete and nothing can follow it."""
        # End tokens come only where the answer is complete; the caller's own stop tokens also where the grammar writes them.
        self.ends = (request.eos_ids, tuple(token for token in request.stop_ids if token not in request.eos_ids))
        self.min_new_tokens = request.config.min_new_tokens

    def error(self) -> CompletionError | None:
        """Say why the request can't go on, after its mask was computed."""
        if not self.matcher.is_error():
            return None
        why, *_ = self.matcher.get_error().partition("<state>")  # behind it stands the parser's insides
        why = "no text matches it from here on" if why.startswith(_NOTHING_FOLLOWS) else " ".join(why.split())[:300]
        return CompletionError.of(
            InvalidRequest(f"response_format can't be followed any further: {why}", param="response_format")
        )

    def settle(self, lane: int) -> None:
        """Take a place in a lane, as far into the grammar as the request is."""
        self.lane = lane
        self.matcher = self.form.roots[lane].deep_copy()
        if self.tokens:
            self.matcher.consume_tokens(self.tokens)


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


class Masking(NamedTuple):
    """Masks under way."""

    rows: Sequence[Row]
    words_qW: _WORDS
    done: Future[None] | None


class Guides:
    """The grammars of one engine's requests. Used by the engine's thread only."""

    def __init__(self, model_path: Path | str) -> None:
        """Read nothing yet: the tokenizer is loaded for the first request with a response format."""
        self._model_path = model_path
        self._grammars: Grammars | None = None
        self._compiler: ThreadPoolExecutor | None = None
        self._waiting: dict[str, Waiting] = {}
        self._formats: dict[ResponseFormat, _Format] = {}
        # Filled by the compiler's thread: formats whose automata it has seen.
        self._on_device: dict[ResponseFormat | None, None] = {}
        self._threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) - 1))
        self._executor: LLExecutor | None = None
        self._masker: ThreadPoolExecutor | None = None

    def is_known(self, request: TokenRequest) -> bool:
        """Whether an automaton on the device holds a request to its format, and is there: it may be queued at once.

        Whoever waits for a grammar that is being compiled is overtaken: a job with one schema starts with a full batch.
        """
        return request.config.response_format in self._on_device and follows_on_device(request)

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

    def take(self, *, patient: bool) -> Iterator[tuple[TokenRequest, Guide | HeadraceError | None]]:
        """Give the requests whose grammars are ready, in the order of `start`. `patient`: there is nothing else to do.

        None: the request needs no guide, because an automaton on the device holds it to its format.
        """
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

    def advance(self, chosen: Sequence[tuple[Guide, int]]) -> None:
        """Go one token on with each guide, and mark those whose answers are complete by it."""
        if not chosen:
            return
        took = self._library().consume_token_par([(guide.matcher, token) for guide, token in chosen])
        for (guide, token), good in zip(chosen, took, strict=True):
            guide.tokens.append(token)
            guide.complete = good and guide.matcher.is_stopped() and not guide.matcher.is_error()

    def begin(self, rows: Sequence[Row]) -> Masking:
        """Start to compute what each row may choose next; a row whose `guide.error()` is set afterwards has a mask that means nothing."""
        grammars = self._grammars
        assert grammars is not None, "masks for requests that were never started"
        words_qW = np.zeros((len(rows), grammars.width), dtype=np.int32)
        if not rows:  # all of the step's rows may belong to requests that have ended
            return Masking(rows, words_qW, None)
        library = self._library()
        self._open_lanes(rows)
        # By lane, as the library cuts the rows into runs: rows of a lane belong to one thread.
        order = sorted(range(len(rows)), key=lambda number: (id(rows[number].guide.form), rows[number].guide.lane))
        wanted = [(rows[number].guide.matcher, number) for number in order]
        if self._masker is None:
            self._masker = ThreadPoolExecutor(1, thread_name_prefix="masks")
        # The thread needs the interpreter lock to set off, which this one would keep for milliseconds otherwise.
        running = threading.Lock()
        running.acquire()

        def compute() -> None:
            running.release()
            library.unsafe_compute_mask_ptr(wanted, words_qW.ctypes.data, words_qW.strides[0], len(rows))

        done = self._masker.submit(compute)
        running.acquire()
        return Masking(rows, words_qW, done)

    def masks(self, masking: Masking) -> TokenMasks:
        """Wait for the masks, and put each request's own ends into them."""
        grammars = self._grammars
        assert grammars is not None, "masks that nobody began"
        rows, words_qW, done = masking
        if done is not None:
            done.result()
        end = grammars.end_id
        may_end_q = (words_qW[:, end >> 5] >> (end & 31)) & 1 == 1
        # The request knows its ends; a tokenizer without one has been given some token in its place.
        words_qW[:, end >> 5] &= ~_bit(end)
        same: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for number, row in enumerate(rows):
            same.setdefault(row.guide.ends, []).append(number)
        for (eos_ids, stop_ids), numbers in same.items():
            _refine(words_qW, numbers, may_end_q[numbers], eos_ids=eos_ids, stop_ids=stop_ids)
        for number, row in enumerate(rows):
            if row.generated < row.guide.min_new_tokens:
                _put_off(words_qW[number], row.guide.ends)
        return TokenMasks(tuple(row.entry for row in rows), words_qW)

    def _library(self) -> LLExecutor:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._threads)
        return self._executor

    def _open_lanes(self, rows: Sequence[Row]) -> None:
        """Open lanes for formats of many rows, and move rows into the lanes that have come up."""
        for form, count in Counter(row.guide.form for row in rows).items():
            if form.grow():
                for number, row in enumerate(row for row in rows if row.guide.form is form):
                    if (lane := number % len(form.roots)) != row.guide.lane:
                        row.guide.settle(lane)
            if (more := form.lacks(count)) > 0:
                assert self._compiler is not None, "a format that nobody compiled"
                form.growing = self._compiler.submit(self._compile_more, form, more)

    def _make(self, request: TokenRequest) -> Guide | None:
        """Run on the compiler's thread."""
        if follows_on_device(request):
            # Read here, not in the step that admits the request: that one is everybody's.
            token_bytes(str(self._model_path))
            self._on_device[request.config.response_format] = None
            if len(self._on_device) > _KEPT:
                del self._on_device[next(iter(self._on_device))]
            return None
        if self._grammars is None:
            self._grammars = Grammars.of_model(self._model_path)
        wanted = request.config.response_format
        assert wanted is not None, "a request without a format has no guide"
        if (form := self._formats.get(wanted)) is None:
            lanes = _LANES_PER_THREAD * self._threads if self._threads > 1 else 1
            form = self._formats[wanted] = _Format(wanted, self._grammars.matcher(wanted), lanes)
            if len(self._formats) > _KEPT:
                del self._formats[next(iter(self._formats))]
        return Guide(form, request)

    def _compile_more(self, form: _Format, count: int) -> list[LLMatcher]:
        """Run on the compiler's thread, where others wait for it: no longer than a format's lanes are worth."""
        assert self._grammars is not None, "a format that nobody compiled"
        more: list[LLMatcher] = []
        until = time.monotonic() + _COMPILING_S
        while len(more) < count:
            if time.monotonic() > until:
                form.most = len(form.roots) + len(more)
                break
            more.append(self._grammars.compile(form.wanted))
        return more


def _bit(token: int) -> np.int32:
    return np.uint32(1 << (token & 31)).view(np.int32)


def _refine(
    words_qW: _WORDS,
    numbers: Sequence[int],
    may_end_n: npt.NDArray[np.bool_],
    *,
    eos_ids: Sequence[int],
    stop_ids: Sequence[int],
) -> None:
    """Put the ends that some rows have in common into their masks, in place: they come only where the grammar is complete."""
    beyond = 32 * words_qW.shape[1]
    for token in (one for one in (*eos_ids, *stop_ids) if one < beyond):
        bit, column = _bit(token), token >> 5
        old_n = words_qW[numbers, column]
        otherwise_n = old_n & ~bit if token in eos_ids else old_n
        words_qW[numbers, column] = np.where(may_end_n, old_n | bit, otherwise_n)


def _put_off(mask_W: _WORDS, ends: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Take the ends out of a mask, in place, for `min_new_tokens`. Where nothing else can come, the end is better than no answer."""
    others_W = mask_W.copy()
    for token in (one for group in ends for one in group if one < 32 * len(mask_W)):
        others_W[token >> 5] &= ~_bit(token)
    if others_W.any():
        mask_W[:] = others_W
