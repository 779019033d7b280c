"""Four ranks, on as many GPUs as there are: real processes, real peer memory, and kernels that wait for three others."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks_on_gpus
import torch
from plan_driver import request
from tiny_models import save_tiny_model

from engine.options import resolve
from engine.request import TokenRequest
from engine.row_shares import LEAST_ROWS
from headrace import PytorchEngineConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ROOT = Path(__file__).parents[2]


def job(number: int, **config: Any) -> TokenRequest:
    prompt = [(number * 7 + place) % 290 + 5 for place in range(1 + number * 37 % 150)]
    return request(prompt, request_id=str(number), seed=number, ignore_eos=True, **{"max_new_tokens": 40, **config})


def tokens(path: Path, jobs: list[TokenRequest], tp: int, **fields: Any) -> dict[str, tuple[int, ...]]:
    given = {"dtype": "float32", "num_gpu_blocks": 1024, "max_batch_size": 64, "session_len": 512, **fields}
    options = replace(resolve(path, PytorchEngineConfig(device="cuda", **given)), tp=tp)
    return ranks_on_gpus.tokens(options, jobs)


@pytest.fixture(autouse=True)
def _tables_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks that take turns measure is no machine's."""
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


def test_sums_of_real_ranks() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/tensor_parallel.py"), "--check-only", "--ranks", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr


# Two KV heads for four ranks; as many as ranks, norms of q and k, chunked and preempted.
@pytest.mark.parametrize(
    ("architecture", "fields", "how"),
    [
        ("llama", {"vocab_size": 401}, {}),
        ("qwen3", {"num_key_value_heads": 4, "hidden_size": 256}, {"max_prefill_token_num": 37, "num_gpu_blocks": 40}),
    ],
)
def test_greedy_tokens_of_one_gpu(tmp_path: Path, architecture: str, fields: dict[str, Any], how: dict[str, Any]) -> None:
    path = save_tiny_model(tmp_path / architecture, architecture, **fields)
    jobs = [job(number) for number in range(64)]
    assert tokens(path, jobs, 4, **how) == tokens(path, jobs, 1)


def test_many_rows_sampled_by_all_four_are_those_of_one_gpu(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "llama", vocab_size=401)
    kinds: tuple[dict[str, Any], ...] = ({"top_k": 0}, {"top_k": 40, "top_p": 0.9}, {"top_k": 1, "repetition_penalty": 1.3})
    jobs = [job(number, max_new_tokens=12, **kinds[number % 3]) for number in range(LEAST_ROWS + 9)]
    how = {"max_batch_size": len(jobs)}
    assert tokens(path, jobs, 4, **how) == tokens(path, jobs, 1, **how)
