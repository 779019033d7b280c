"""The repacked product is the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.layers.matrix import Matrix


@pytest.mark.parametrize("rows", [1, 3, 64, 129])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (960, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_equals_linear(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape[0] + 5, shape[1], dtype=dtype)[2:-3]  # a slice of a tied or sharded weight
    bias = torch.randn(shape[0], dtype=dtype)
    x = torch.randn(rows, 2 * shape[1], dtype=dtype)[:, : shape[1]]  # rows with a stride
    matrix = Matrix(weight)
    truth = F.linear(x.double(), weight.double())
    tolerance = {"atol": 2e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    torch.testing.assert_close(matrix(x).double(), truth, **tolerance)
    torch.testing.assert_close(matrix(x, bias).double(), truth + bias.double(), **tolerance)
    assert matrix.nbytes == weight.nbytes
