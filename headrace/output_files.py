"""How large the files of a batch's answers are: counted once, when the batch is over, because their lines exist only while they are read.

Knows no HTTP; whose turn it is to count is said by the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from headrace.batch import Batch, OutputKind
from headrace.batch_output import line, split_file_id
from headrace.errors import NotFound

if TYPE_CHECKING:
    from headrace.store import Store
    from headrace.store.files import StoredFile

log = logging.getLogger(__name__)

PAGE: Final = 500
"""Lines of an output file that are in memory at one time."""
_PAGES_A_CLAIM: Final = 50


def pages(store: Store, batch: Batch, kind: OutputKind) -> Iterator[bytes]:
    """Make the file's lines, `PAGE` of them at a time. Raises `NotFound` once the batch is deleted: what was read is not the whole."""
    after = -1
    # Pages in transactions of their own: a reader that stays open for hours would let SQLite's WAL grow without bound.
    while rows := store.output_rows(batch.id, kind, after=after, limit=PAGE):
        yield b"".join(line(row, batch_id=batch.id, model=batch.model, endpoint=batch.endpoint) for row in rows)
        after = rows[-1].position


def count_next(store: Store, *, stop: Callable[[], bool]) -> bool:
    """Count the bytes of one file that waits for it; False: there is none, or `stop` said so before the end."""
    stored = store.files.claim_counting()
    return stored is not None and count(store, stored, stop=stop, is_waited_for=False) is not None


def count(
    store: Store, stored: StoredFile, *, stop: Callable[[], bool] = lambda: False, is_waited_for: bool = True
) -> StoredFile | None:
    """Count a file's bytes, note them, and return it with them; None: its batch is gone, or `stop` said so before the end."""
    place = split_file_id(stored.id)
    assert place is not None, f"{stored.id} is no file of answers"
    batch_id, kind = place
    size = 0
    try:
        batch = store.get_batch(batch_id)
        began = time.perf_counter()
        for number, page in enumerate(pages(store, batch, kind), 1):
            size += len(page)
            if not is_waited_for:
                # A million lines in one go would keep this process's requests waiting for the interpreter, for half a minute.
                time.sleep(time.perf_counter() - began)
            began = time.perf_counter()
            if stop() or (number % _PAGES_A_CLAIM == 0 and not store.files.go_on_counting(stored.id)):
                return None
    except NotFound:
        return None
    store.files.set_size(stored.id, size)
    log.debug("%s has %d bytes", stored.id, size, extra={"event": "output_counted", "file_id": stored.id, "bytes": size})
    return replace(stored, bytes=size, is_counted=True)
