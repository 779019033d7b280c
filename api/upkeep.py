"""The API's own look at what time brings about: a batch's window is over though no worker runs."""

from __future__ import annotations

import logging
import threading

from api.file_batches import CLOSE_PATIENCE_S
from api.services import Services
from headrace.errors import StorageFull, StoreUnavailable
from headrace.upkeep import sweep

log = logging.getLogger(__name__)


class Upkeep:
    """A thread that sweeps every `reconcile_interval_s`. Not one of the readers': they may be at a large file for minutes."""

    def __init__(self, services: Services) -> None:
        """Prepare; nothing runs before `start`."""
        self._services = services
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-upkeep", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop at the next piece; another process goes on there."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_PATIENCE_S)

    def _run(self) -> None:
        while not self._stop.wait(self._services.settings.reconcile_interval_s):
            try:
                sweep(self._services.store, self._services.settings, stop=self._stop.is_set)
            except (StoreUnavailable, StorageFull) as error:
                log.warning(
                    "what is due is ended later: %s", error.message, extra={"event": "sweep_postponed", "code": error.code}
                )
            except Exception:
                log.exception("a sweep failed; the next one tries again", extra={"event": "sweep_failed"})
