"""Pipelines on a tiny model, and when they have come to rest."""

from __future__ import annotations

import time

from device import DEVICE

from engine.async_engine import AsyncEngine
from headrace import PytorchEngineConfig

SMALL = PytorchEngineConfig(device=DEVICE, num_gpu_blocks=256, block_size=16, max_batch_size=16)


def assert_idle(pipe: AsyncEngine) -> None:
    """Nothing is in the engine or waits for it, now or within a few seconds."""
    deadline = time.monotonic() + 10
    while pipe.report()["stats"]["in_engine"] and time.monotonic() < deadline:
        time.sleep(0.02)
    stats = pipe.report()["stats"]
    assert (stats["in_engine"], stats["pending"]) == (0, 0)
