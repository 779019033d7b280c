"""A Celery worker whose engine is two ranks on two GPUs: a batch through Redis and SQL, a killed rank in its middle, each row once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from servers import RedisServer
from service import Service
from worker_process import wait_for

from headrace.config import GenerationConfig
from headrace.settings import Settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")]
COUNT = 400


@pytest.fixture
def service(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Service]:
    engine = {"tp": 2, "dtype": "float32", "num_gpu_blocks": 256, "max_batch_size": 16}
    with RedisServer() as redis:
        settings = Settings(
            model=str(tiny_model_dir),
            engine_config=json.dumps(engine),
            database_url=f"sqlite:///{tmp_path}/headrace.db",
            redis_url=redis.url,
        )
        made = Service(settings, tmp_path)
        yield made
        made.close()


def test_a_batch_whose_rank_is_killed(service: Service) -> None:
    with service.worker() as worker:
        service.ready(worker, timeout_s=120)
        config = GenerationConfig(max_new_tokens=100, ignore_eos=True)
        batch = service.submit([f"prompt {number}" for number in range(COUNT)], gen_config=config)
        wait_for(lambda: service.done(batch) > 20, timeout_s=60, what="some are done", process=worker)
        ranks = [child.pid for child in psutil.Process(worker.pid).children(recursive=True) if "engine.rank" in child.cmdline()]
        assert len(ranks) >= 2, ranks
        os.kill(ranks[-1], signal.SIGKILL)
        assert service.done(batch) < COUNT
        service.wait_over(batch, worker, timeout_s=120)
        rows = service.assert_exactly_once(batch, COUNT)
        assert all(row.error is None and row.usage.completion_tokens == 100 for row in rows)
