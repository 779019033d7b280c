"""Python imports this first where this folder is on PYTHONPATH: it puts a process's clock wrong, or lets it lose what it sends.

`FAULT_SKEW_S`: seconds by which every clock that Python code reads as wall time is ahead. `FAULT_SENDER_LOG`: a file that gets a line
`time chunk_id kept|dropped` for each chunk that is sent to Redis; `FAULT_DROP_SHARE`: the share of them that never arrive though the
sender believes it, drawn by `FAULT_SEED`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

_skew_s = float(os.environ.get("FAULT_SKEW_S", "0"))
if _skew_s:
    _time, _time_ns = time.time, time.time_ns
    time.time = lambda: _time() + _skew_s
    time.time_ns = lambda: _time_ns() + int(_skew_s * 1e9)


def lossy(enqueue: Callable[..., None], path: str, share: float, seed: int) -> Callable[..., None]:
    """Return `Broker.enqueue` with a log, which forgets its share of the messages."""
    draw = random.Random(seed)
    lock = threading.Lock()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def send(broker: Any, message: Any) -> None:
        with lock:
            dropped = draw.random() < share
        if not dropped:
            enqueue(broker, message)
        os.write(file, f"{time.time():.3f} {message.chunk_id} {'dropped' if dropped else 'kept'}\n".encode())

    return send


if "FAULT_SENDER_LOG" in os.environ:
    from headrace.broker import Broker

    _seed = int(os.environ.get("FAULT_SEED", "0")) + os.getpid()
    Broker.enqueue = lossy(  # type: ignore[method-assign]
        Broker.enqueue, os.environ["FAULT_SENDER_LOG"], float(os.environ.get("FAULT_DROP_SHARE", "0")), _seed
    )
