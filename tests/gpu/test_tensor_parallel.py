"""Ranks on GPUs of their own: the sums, the tokens of one GPU, ranks that die or hang, and nothing left behind."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_on_gpus
import torch
from rank_faults import Watched, eventually, is_gone, shared_memory, strike
from tiny_models import save_tiny_model

from engine.async_engine import AsyncEngine
from engine.options import resolve
from engine.request import TokenRequest
from engine.row_shares import LEAST_ROWS
from engine.supervisor import Limits
from headrace import GenerationConfig, PytorchEngineConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")]

ROOT = Path(__file__).parents[2]


def requests(vocab: int, count: int, *, first: int = 0, **config: Any) -> list[TokenRequest]:
    draw = random.Random(5 + first)
    gen = GenerationConfig(**{"top_k": 1, "max_new_tokens": 40, "ignore_eos": True, **config})
    return [
        TokenRequest(
            request_id=str(number), prompt_ids=tuple(draw.randrange(3, vocab) for _ in range(draw.randint(1, 150))), config=gen,
            seed=number, choice=0, max_new_tokens=gen.max_new_tokens or 1, limit="max_new_tokens",
        )
        for number in range(first, first + count)
    ]  # fmt: skip


def tokens(path: Path, jobs: list[TokenRequest], **fields: Any) -> dict[str, tuple[int, ...]]:
    given: dict[str, Any] = {
        "device": "cuda",
        "dtype": "float32",
        "num_gpu_blocks": 256,
        "max_batch_size": 64,
        "session_len": 512,
    }
    return ranks_on_gpus.tokens(resolve(path, PytorchEngineConfig(**{**given, **fields})), jobs)


def test_sums_of_real_ranks() -> None:
    """Eager and captured, to the bit, on every rank the same; see the benchmark for how fast."""
    command = [sys.executable, str(ROOT / "benchmarks/tensor_parallel.py"), "--check-only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# 401 tokens: the vocabulary doesn't divide; one KV head for two ranks, biases, chunked and preempted; norms of q and k, without graphs.
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {"vocab_size": 401, "tie_word_embeddings": True}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("qwen3", {"hidden_size": 256}),
    ],
)
def test_greedy_tokens_of_one_gpu(tmp_path: Path, architecture: str, fields: dict[str, Any]) -> None:
    path = save_tiny_model(tmp_path / architecture, architecture, **fields)
    jobs = requests(300, 64)
    how = {"qwen2": {"max_prefill_token_num": 37, "num_gpu_blocks": 40}, "qwen3": {"eager_mode": True}}.get(architecture, {})
    assert tokens(path, jobs, tp=2, **how) == tokens(path, jobs)


def test_both_ranks_sample_alike(tmp_path: Path) -> None:
    """bfloat16, sampled, few rows and many: a rank that chose another token than its peer would compute other keys from there on."""
    path = save_tiny_model(tmp_path / "llama", head_dim=64, hidden_size=512, intermediate_size=1024)
    jobs = requests(300, 48, top_k=0, temperature=1.0, max_new_tokens=60)
    jobs += requests(300, 3 * LEAST_ROWS, first=48, top_k=0, temperature=1.0, max_new_tokens=20)
    how = {"dtype": "bfloat16", "max_batch_size": 2 * LEAST_ROWS, "num_gpu_blocks": 1024}
    first = tokens(path, jobs, tp=2, **how)
    assert tokens(path, jobs, tp=2, **how) == first
    assert [len(first[job.request_id]) for job in jobs] == [job.max_new_tokens for job in jobs]


def test_many_rows_sampled_by_both_ranks_are_those_of_one_gpu(tmp_path: Path) -> None:
    """An odd count of them, each rank its share: every filter and penalty, and no token that one GPU wouldn't have drawn."""
    path = save_tiny_model(tmp_path / "llama", vocab_size=401)
    kinds: tuple[dict[str, Any], ...] = (
        {"top_k": 0, "temperature": 1.0},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
        {"top_k": 1, "repetition_penalty": 1.3, "min_new_tokens": 4},
    )
    each = LEAST_ROWS // 2 + 1
    jobs = [job for n, kind in enumerate(kinds) for job in requests(300, each, first=n * each, max_new_tokens=16 + n, **kind)]
    how = {"max_batch_size": len(jobs), "num_gpu_blocks": 1024}
    assert tokens(path, jobs, tp=2, **how) == tokens(path, jobs, **how)


def used_mib() -> list[int]:
    """Memory in use on each GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.check_output(command, text=True).split()]


def test_ranks_that_die_and_one_that_hangs(tiny_model_dir: Path) -> None:
    used, shared, watched, pids = used_mib(), shared_memory(), Watched(), set[int]()
    config = PytorchEngineConfig(device="cuda", dtype="float32", num_gpu_blocks=512, tp=2, max_batch_size=64)
    # A step that compiles a kernel says nothing for seconds.
    with AsyncEngine(str(tiny_model_dir), backend_config=config, limits=Limits(watchdog_s=8.0), on_event=watched) as pipe:
        for victim, how, most in ((1, signal.SIGKILL, 1.0), (0, signal.SIGKILL, 1.0), (1, signal.SIGSTOP, 10.0)):
            noticed, seen = strike(pipe, watched, victim, how, prompts=60, tokens=150)
            pids |= seen
            print(f"rank {victim}, {how.name}: noticed after {noticed:.2f} s")
            assert noticed < most
    assert eventually(lambda: all(is_gone(pid) for pid in pids), 5)
    assert eventually(lambda: all(now - then < 64 for now, then in zip(used_mib(), used, strict=True)), 10), (used, used_mib())
    assert not shared_memory() - shared
