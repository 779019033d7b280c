"""A rank of two that is killed, or that hangs: noticed, its group started again, every prompt answered once, nothing left behind.

On GPUs, over NCCL: tests/gpu/test_tensor_parallel.py.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from rank_faults import Watched, eventually, is_gone, shared_memory, strike

from engine.async_engine import AsyncEngine
from engine.supervisor import Limits
from headrace import PytorchEngineConfig

WATCHDOG_S = 2.0


@pytest.mark.slow
def test_a_rank_that_dies_and_one_that_hangs(tiny_model_dir: Path) -> None:
    shared, watched, pids = shared_memory(), Watched(), set[int]()
    config = PytorchEngineConfig(device="cpu", tp=2, num_gpu_blocks=256, max_batch_size=16)
    with AsyncEngine(
        str(tiny_model_dir), backend_config=config, limits=Limits(watchdog_s=WATCHDOG_S), on_event=watched
    ) as pipe:
        noticed, seen = strike(pipe, watched, 1, signal.SIGKILL, prompts=12, tokens=60)
        pids |= seen
        assert noticed < 1.0
        # Rank 0 lives on, in the middle of a sum with a rank that is silent.
        noticed, seen = strike(pipe, watched, 1, signal.SIGSTOP, prompts=12, tokens=60)
        pids |= seen
        assert WATCHDOG_S - 0.5 < noticed < WATCHDOG_S + 2.0
    assert eventually(lambda: all(is_gone(pid) for pid in pids), 5)
    assert not {name for name in shared_memory() - shared if name.startswith("headrace")}
