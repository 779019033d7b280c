"""Weights on their way to a GPU: what arrives is what was stored, by any number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.staging import Staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def sources() -> list[torch.Tensor]:
    """Shorter and longer than a buffer, rows longer than one, columns cut out, nothing at all."""
    wide = torch.randn(3000, 4097)
    return [torch.randn(5), torch.randn(0, 4), wide, wide.bfloat16(), wide[1:900, 5:2000], torch.randn(2, 5_000_000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_arrives(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    staging = Staging(device)

    def copied(source: torch.Tensor) -> torch.Tensor:
        out = torch.full(source.shape, torch.nan, dtype=dtype, device=device)
        staging.copy(out, source)
        return out

    given = sources() * 6
    with ThreadPoolExecutor(6) as pool:
        outs = list(pool.map(copied, given))
    torch.cuda.synchronize()
    assert all(torch.equal(out.cpu(), source.to(dtype)) for out, source in zip(outs, given, strict=True))
