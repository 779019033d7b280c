"""Threads that launch kernels for the first time, as an engine does while it loads: each kernel is launched by its own launcher."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl

from kernels.gpu.launchers import load_one_at_a_time

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
THREADS, TIMES = 6, 8


@triton.jit
def _one(p_out, a, N: tl.constexpr):
    tl.store(p_out, a + N)


@triton.jit
def _two(p_out, a, b, N: tl.constexpr):
    tl.store(p_out, a + b + N)


@triton.jit
def _three(p_out, a, b, c, N: tl.constexpr):
    tl.store(p_out, a + b + c + N)


@pytest.fixture
def impatient() -> Iterator[None]:
    """See tests/kernels/test_launchers.py."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("impatient")
def test_each_kernel_has_its_own() -> None:
    load_one_at_a_time()
    kernels = (_one, _two, _three)

    def launch(thread: int) -> list[float]:
        kernel, count = kernels[thread % 3], thread % 3 + 1
        found = []
        for number in range(TIMES):
            out = torch.full((1,), -1.0, device="cuda")
            # Another N is another kernel with the same arguments: Triton loads the same launcher again.
            kernel[(1,)](out, *(float(thread + 2) for _ in range(count)), N=1000 * thread + number)
            found.append(out.item() - count * (thread + 2) - 1000 * thread - number)
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(launch, range(THREADS))) == [[0.0] * TIMES] * THREADS
