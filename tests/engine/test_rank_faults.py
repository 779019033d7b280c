"""A rank of two that hangs: noticed, its group started again, every prompt answered once, nothing left behind.

One that is killed: tests/headrace/test_pipeline.py. Both on GPUs, over NCCL: tests/gpu/test_tensor_parallel.py.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from rank_faults import Watched, eventually, is_gone, shared_memory, strike

from engine.async_engine import AsyncEngine
from engine.supervisor import Limits
from headrace import PytorchEngineConfig

WATCHDOG_S = 4.0
"""Far above a step of the tiny model on cores that others use too."""


@pytest.mark.slow
def test_a_rank_that_hangs(tiny_model_dir: Path) -> None:
    shared, watched = shared_memory(), Watched()
    config = PytorchEngineConfig(device="cpu", tp=2, num_gpu_blocks=256, max_batch_size=16)
    with AsyncEngine(
        str(tiny_model_dir), backend_config=config, limits=Limits(watchdog_s=WATCHDOG_S), on_event=watched
    ) as pipe:
        # Rank 0 lives on, in the middle of a sum with a rank that is silent.
        noticed, pids = strike(pipe, watched, 1, signal.SIGSTOP, prompts=8, tokens=40)
        assert WATCHDOG_S / 2 < noticed < WATCHDOG_S + 10.0
    assert eventually(lambda: all(is_gone(pid) for pid in pids), 5)
    assert not {name for name in shared_memory() - shared if name.startswith("headrace")}
