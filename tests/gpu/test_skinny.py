"""The skinny GEMM on the device: every type against float64, and a chain of kernels that start before the one ahead ends."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_against_float64(dtype: str) -> None:
    from skinny_checks import run_checks

    checks = list(run_checks([dtype], "cuda"))
    assert checks
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_a_chain_gives_what_its_kernels_give_one_by_one(rows: int) -> None:
    """Each kernel writes what the next reads, a thousand times over; a read before the wait would see the round before."""
    from kernels.skinny_gemm import skinny_linear

    torch.manual_seed(0)
    up, down = (torch.randn(shape, device="cuda").bfloat16() / 40 for shape in ((2 * 2048, 1024), (1024, 2048)))
    norm = torch.ones(1024, device="cuda").bfloat16()
    x = torch.randn(rows, 1024, device="cuda").bfloat16()

    def rounds(*, apart: bool) -> torch.Tensor:
        residual = x.clone()
        for _ in range(250):
            hidden = skinny_linear(residual, up, norm_I=norm, eps=1e-5, gated=True)
            if apart:
                torch.cuda.synchronize()
            residual = skinny_linear(hidden, down, residual_TO=residual)
            if apart:
                torch.cuda.synchronize()
        return residual

    expected = rounds(apart=True)
    assert torch.equal(rounds(apart=False), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = rounds(apart=False)
    for _ in range(4):
        graph.replay()
        assert torch.equal(out, expected)
