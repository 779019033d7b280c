"""A batch that is read from an uploaded file: accepted here at once, read in the background.

The reply is there before the file is read: what its lines hold shows in the batch's state. Knows no HTTP and no engine.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Final

from api.auth import Caller
from api.intake import choose_model
from api.services import Services
from headrace.batch import ROWS, Batch
from headrace.batch_input import Rules, first_config
from headrace.dataset import MAX_LINE_BYTES
from headrace.errors import InvalidRequest, NotFound, StorageFull, StoreUnavailable
from headrace.schemas import BatchCreate

if TYPE_CHECKING:
    from headrace.store import Store

log = logging.getLogger(__name__)

READERS: Final = 2
"""Files that one process reads at a time: a short one doesn't wait for a long one, and requests are still answered quickly."""
CLOSE_PATIENCE_S: Final = 10.0
_FILE_ID: Final = re.compile(r"file-[0-9a-f]{32}")


def create_from_file(
    services: Services, caller: Caller, create: BatchCreate, *, idempotency_key: str | None, resent: int
) -> Batch:
    """Store the batch, wake the readers, and return it. Raises as `Ingests.create` and `choose_model` do."""
    from headrace.store.creation import Order

    settings, store = services.settings, services.store
    assert create.input_file_id is not None
    endpoint = create.endpoint or ROWS
    if endpoint != ROWS and "gen_config" in create.model_fields_set:
        raise InvalidRequest(f"gen_config belongs to /v1/batches; for {endpoint} each line's body says how", param="gen_config")
    model, gen_config = choose_model(create.model, settings), create.gen_config
    if not _FILE_ID.fullmatch(create.input_file_id):  # before PostgreSQL chokes on its characters
        raise _no_file(create.input_file_id)
    if endpoint != ROWS:
        rules = Rules(endpoint=endpoint, model=model, served=settings.served_models, max_prompt_bytes=settings.max_prompt_bytes)
        named, config = first_config(rules, _first_line(store, create.input_file_id, caller))
        if create.model is None and named in settings.served_models:
            model = str(named)
        # What most lines ask for needs to be stored once only.
        gen_config = config or gen_config
    order = Order(
        gen_config=gen_config,
        model=model,
        chunk_size=settings.chunk_size,
        metadata=create.metadata or {},
        priority=create.priority,
        completion_window=create.completion_window,
        endpoint=endpoint,
        idempotency_key=idempotency_key,
        owner=caller.owner,
        max_open_prompts=settings.max_open_prompts,
    )
    batch_id = store.ingests.create(order, create.input_file_id, scope=caller.scope, resent=resent)
    services.wake_readers()
    return store.get_batch(batch_id)


def _first_line(store: Store, file_id: str, caller: Caller) -> bytes:
    """Return the first line that is not blank, or some beginning of one that is too long."""
    try:
        stored = store.files.get(file_id, owner=caller.scope)
    except NotFound as error:
        raise _no_file(file_id) from error
    text = b""
    for part in store.files.stream(stored):
        text = (text + part).lstrip()
        line, end, _ = text.partition(b"\n")
        if end or len(text) > MAX_LINE_BYTES:
            return line
    return text


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:80]!r}; upload it with POST /v1/files", param="input_file_id")


class Readers:
    """Threads that read the files of batches while they are `validating`: those of this process's requests, and those left behind.

    They also go on with cancels and deletions that were too long for a request, and count the bytes of the files of batches that
    are over.
    """

    def __init__(self, services: Services) -> None:
        """Prepare; nothing runs before `start`."""
        self._services = services
        self._work = threading.Event()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"headrace-reader-{number}", daemon=True) for number in range(READERS)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Say that there is something to do."""
        self._work.set()

    def close(self) -> None:
        """Stop at the next slice; another reader goes on there."""
        self._stop.set()
        self._work.set()
        deadline = time.monotonic() + CLOSE_PATIENCE_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        from headrace.ingest import read_next
        from headrace.output_files import count_next

        while not self._stop.is_set():
            # Not only when woken: the reader of another process may have been killed.
            self._work.wait(self._services.settings.reconcile_interval_s)
            self._work.clear()
            try:
                while not self._stop.is_set():
                    done = read_next(self._services.store, self._services.settings, stop=self._stop.is_set)
                    if done is None:
                        break
                    # There may be another for the other thread.
                    self._work.set()
                    self._services.send_chunks(model=self._services.store.get_batch(done).model)
                self._services.store.close_and_erase(stop=self._stop.is_set)
                while count_next(self._services.store, stop=self._stop.is_set):
                    pass
            except (StoreUnavailable, StorageFull) as error:
                log.warning(
                    "files of batches are read later: %s", error.message, extra={"event": "read_postponed", "code": error.code}
                )
                self._stop.wait(1.0)
            except NotFound:
                # The batch was deleted in the moment that it was done.
                continue
            except Exception:
                log.exception(
                    "reading the file of a batch failed; it is read on when its lease has run out",
                    extra={"event": "read_failed"},
                )
                self._stop.wait(1.0)
