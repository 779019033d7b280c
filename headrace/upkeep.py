"""What time brings about: windows that are over, files and batches that have outlived their days.

Every process that serves or works looks every few seconds, and several at once do no harm: a batch must come to its end though
no worker runs, or no API. Knows no HTTP and no engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.settings import Settings

if TYPE_CHECKING:
    from headrace.store import Store


def sweep(store: Store, settings: Settings, *, stop: Callable[[], bool] = lambda: False) -> None:
    """End what is due. `stop` is asked between pieces of long work. Raises `StoreUnavailable` and `StorageFull`."""
    store.expire_batches(stop=stop)
    retention_s = settings.retention_s if math.isfinite(settings.retention_s) else None
    if retention_s is not None and not stop():
        store.delete_outlived(retention_s=retention_s)
    if not stop():
        store.files.sweep(retention_s=retention_s)
