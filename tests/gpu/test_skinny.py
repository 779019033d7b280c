"""The skinny GEMM on the device: every type against float64, and a chain of kernels that start before the one ahead ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

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


def test_a_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import gemm_table
    from engine.models.loading import load_decoder
    from engine.parallel import SingleRank

    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    path = save_tiny_model(tmp_path / "llama", "llama", head_dim=64, hidden_size=256, intermediate_size=512)
    load = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0), "group": SingleRank(), "max_positions": 64}
    first = load_decoder(path, **load)
    written = gemm_table.table_path().read_text()
    times = gemm_table.read_times(gemm_table.table_path(), gemm_table.table_key(first))
    assert set(times) == set(gemm_table.servable(first)) == {1, 2, 16, 32, 64}
    assert first.few_rows == gemm_table.faster(times)
    assert load_decoder(path, **load).few_rows == first.few_rows
    assert gemm_table.table_path().read_text() == written
