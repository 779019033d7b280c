"""Reads the files of batches that are `validating`: lines to prompts, in bounded memory, by whoever is there.

The API starts this when a batch comes in, and looks for ingests that nobody reads; so does every worker's reconciler. Two at once do no
harm: the lease says who reads. Knows no HTTP, no Redis and no engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from headrace.batch import ROWS, Item
from headrace.batch_input import Fault, Rules, reader
from headrace.dataset import MAX_LINE_BYTES
from headrace.store.ingest import MAX_ATTEMPTS, Ingest, IngestStatus, Place

if TYPE_CHECKING:
    from headrace.settings import Settings
    from headrace.store import Store

log = logging.getLogger(__name__)

SLICE_ROWS: Final = 2000
SLICE_BYTES: Final = 4 << 20
SLICE_S: Final = 3.0
"""A slice is stored after so long even if it isn't full: the lease is renewed with it."""
MAX_FAULTS: Final = 100
SEAL_LEASE_S: Final = 120.0
"""While the database looks for names that were used twice, which it does in one statement."""


def read_next(
    store: Store, settings: Settings, *, batch_id: str | None = None, stop: Callable[[], bool] = lambda: False
) -> str | None:
    """Read one file to its end, the one of `batch_id` or the oldest that nobody reads; return the batch's id, or None: there is none.

    `stop` is asked after each slice: when it says so, the rest is left to another reader, at once. Raises `StoreUnavailable` and `StorageFull`: another reader goes on when the lease has run out.
    """
    ingest = store.ingests.claim(batch_id=batch_id)
    if ingest is None:
        return None
    started = time.monotonic()
    status, place, faults = _Reading(store, settings, ingest, stop).run()
    log.info(
        "the file of %s was read: %s, %d lines, %d prompts, %d faults", ingest.batch_id, status, place.line, place.rows, len(faults),
        extra={
            "event": "batch_read", "batch_id": ingest.batch_id, "status": str(status), "lines": place.line, "prompts": place.rows,
            "faults": len(faults), "seconds": round(time.monotonic() - started, 2),
        },
    )  # fmt: skip
    return ingest.batch_id


class _Reading:
    """One claim's work."""

    def __init__(self, store: Store, settings: Settings, ingest: Ingest, stop: Callable[[], bool]) -> None:
        self._store = store
        self._stop = stop
        self._ingest = ingest
        self._most = settings.max_prompts
        self._faults: list[dict[str, Any]] = [dict(error) for error in ingest.errors]
        served = settings.served_models
        rules = Rules(endpoint=ingest.endpoint, model=ingest.model, served=served, max_prompt_bytes=settings.max_prompt_bytes)
        self._read = reader(rules)
        # What is committed.
        self._place = ingest.place
        # Set when no further fault is wanted.
        self._is_over = False

    def run(self) -> tuple[IngestStatus, Place, list[dict[str, Any]]]:
        """Read to the end."""
        if self._ingest.attempts > MAX_ATTEMPTS:
            self._fault(
                Fault("ingest_failed", f"Reading the file failed {MAX_ATTEMPTS} times in a row; the service's log says why.")
            )
            status = IngestStatus.OK
        else:
            status = self._take_lines()
            if status is IngestStatus.OK and not self._faults:
                status = self._check_whole()
        if status is IngestStatus.OK and not self._faults:
            status = self._store.ingests.finish(self._ingest, total=self._place.rows)
        if status is IngestStatus.OK and self._faults:
            # Written down first: a reader that goes on in the middle of the removal must not take what is left for the whole.
            status = self._commit([], self._place)
        if status is IngestStatus.CANCELLED or (status is IngestStatus.OK and self._faults):
            status = self._store.ingests.discard(self._ingest, self._faults, rows=self._place.rows)
        return status, self._place, self._faults

    def _take_lines(self) -> IngestStatus:
        """Store the lines; after the first fault only look for more of them."""
        items: list[Item] = []
        size, place, began = 0, self._place, time.monotonic()
        for text, behind in _lines(self._store, self._ingest, place):
            place = Place(behind.part, behind.offset, behind.line, place.rows)
            if text is None or text.strip():
                found = self._read(behind.line, text)
                if isinstance(found, Fault):
                    self._fault(found)
                elif not self._faults:
                    items.append(found)
                    place = Place(place.part, place.offset, place.line, place.rows + 1)
                    size += len(text or b"")
                    if place.rows > self._most:
                        self._fault(
                            Fault("too_many_requests", f"The file has more than {self._most:,} lines; split it.", behind.line)
                        )
            if len(self._faults) >= MAX_FAULTS or "too_many_requests" in {fault["code"] for fault in self._faults[-1:]}:
                break
            if len(items) >= SLICE_ROWS or size >= SLICE_BYTES or time.monotonic() - began > SLICE_S:
                if (status := self._commit(items, place)) is not IngestStatus.OK:
                    return status
                if self._stop():
                    self._store.ingests.release(self._ingest)
                    return IngestStatus.FENCED
                items, size, began = [], 0, time.monotonic()
        return self._commit(items, place)

    def _commit(self, items: list[Item], place: Place) -> IngestStatus:
        status = self._store.ingests.append(self._ingest, items, place, self._faults)
        if status is IngestStatus.OK:
            self._place = place
        return status

    def _check_whole(self) -> IngestStatus:
        """Find what no line shows by itself: that there is none, and names that were used twice."""
        if self._place.rows == 0:
            self._fault(Fault("empty_file", "The file has no lines; a batch needs at least one request."))
        if self._faults or self._ingest.endpoint == ROWS:
            return IngestStatus.OK
        status = self._store.ingests.keep(self._ingest, SEAL_LEASE_S)
        if status is not IngestStatus.OK:
            return status
        repeated = self._store.ingests.repeated_ids(self._ingest, limit=MAX_FAULTS)
        lines = self._line_numbers([index for _, index in repeated])
        for (name, _), line in zip(repeated, lines, strict=True):
            message = (
                f"The custom_id {name!r} of this request is that of an earlier one. The custom_id parameter must be unique for each "
                "request in a batch."
            )
            self._fault(Fault("duplicate_custom_id", message, line, "custom_id"))
        return IngestStatus.OK

    def _line_numbers(self, indexes: list[int]) -> list[int]:
        """Return the numbers of the lines that became the prompts at these ascending indexes; blank lines became none."""
        found: list[int] = []
        if not indexes:
            return found
        index = -1
        for text, behind in _lines(self._store, self._ingest, Place()):
            index += text is None or bool(text.strip())
            if index == indexes[len(found)] and (text is None or text.strip()):
                found.append(behind.line)
                if len(found) == len(indexes):
                    break
        return found

    def _fault(self, fault: Fault) -> None:
        self._faults.append(fault.to_dict())


def _lines(store: Store, ingest: Ingest, place: Place) -> Iterator[tuple[bytes | None, Place]]:
    """Yield each line from `place` on with the place behind it; None: longer than `MAX_LINE_BYTES`. One part and one line in memory."""
    parts = store.files.get(ingest.file_id).parts
    line, pending, is_long = place.line, bytearray(), False
    for part in range(place.part, parts):
        body = store.files.part(ingest.file_id, part)
        start = place.offset if part == place.part else 0
        while (end := body.find(b"\n", start)) >= 0:
            line += 1
            is_long = is_long or len(pending) + end - start > MAX_LINE_BYTES
            # The common case, a line within a part, is one copy.
            text = body[start:end] if not pending else bytes(pending) + body[start:end]
            start = end + 1
            yield None if is_long else text, Place(part, start, line)
            pending, is_long = bytearray(), False
        is_long = is_long or len(pending) + len(body) - start > MAX_LINE_BYTES
        pending = bytearray() if is_long else pending + body[start:]
    if pending or is_long:
        yield None if is_long else bytes(pending), Place(parts, 0, line + 1)
