"""`pipeline()` on GPUs: the CPU's text, a killed engine process, two ranks over NCCL, memory given back."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import GenerationConfig, PytorchEngineConfig, pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPTS = ["water", "the mill wheel turns " * 20, "水車 🙂", *(f"prompt {number}" for number in range(40))]
MIB = 1 << 20
GREEDY = GenerationConfig(max_new_tokens=16)


def config(device: Any, **fields: Any) -> PytorchEngineConfig:
    return PytorchEngineConfig(device=device, dtype="float32", num_gpu_blocks=256, **fields)


def test_text_of_the_cpu(tiny_model_dir: Path) -> None:
    with pipeline(str(tiny_model_dir), backend_config=config("cpu")) as pipe:
        expected = [response.text for response in pipe(PROMPTS, GREEDY)]
    with pipeline(str(tiny_model_dir), backend_config=config("cuda")) as pipe:
        assert [response.text for response in pipe(PROMPTS, GREEDY)] == expected


@pytest.mark.parametrize("tp", [1, 2])
def test_killed_rank_in_the_middle_of_a_batch(tiny_model_dir: Path, tp: int) -> None:
    if torch.cuda.device_count() < tp:
        pytest.skip("one CUDA device only")
    long = GenerationConfig(max_new_tokens=300, ignore_eos=True)
    # Two at a time: a batch of them all is done before anybody can be killed.
    with pipeline(str(tiny_model_dir), backend_config=config("cuda", tp=tp, max_batch_size=2)) as pipe:
        pipe(PROMPTS, GREEDY)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.extend(pipe(PROMPTS, long)))
        thread.start()
        time.sleep(0.3)
        pids = pipe.frontend.pids
        os.kill(pids[-1], signal.SIGKILL)
        thread.join(120)
        assert len(got) == len(PROMPTS)
        assert all(response.error_code is None and len(response.token_ids) == 300 for response in got)
        assert not set(pids) & set(pipe.frontend.pids)


def test_memory_comes_back(tiny_model_dir: Path) -> None:
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        pipe = pipeline(str(tiny_model_dir), backend_config=PytorchEngineConfig(device="cuda"))
        pid = pipe.frontend.pids[0]
        assert pipe("water", GREEDY).error_code is None  # type: ignore[union-attr]
        assert before - torch.cuda.mem_get_info()[0] > 256 * MIB  # the other process's context, graphs and pool
        pipe.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert abs(torch.cuda.mem_get_info()[0] - before) < 64 * MIB
