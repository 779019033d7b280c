"""The repacked product is the plain one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from engine.layers.matrix import Matrix, padded_rows
from engine.rank_process import ROOT

MANY = """
import random, torch
from engine.layers.matrix import Matrix
matrix, draw = Matrix(torch.randn(100, 64)), random.Random(0)
for _ in range(300):
    matrix(torch.randn(draw.randint(1, 300), 64))
"""


@pytest.mark.parametrize("rows", [0, 1, 3, 9, 64, 129])
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


def test_row_counts_are_few_and_little_is_computed_for_nothing() -> None:
    given = {rows: padded_rows(rows) for rows in range(8193)}
    assert all(rows <= padded <= 1.25 * rows for rows, padded in given.items())
    assert all(given[rows] == rows for rows in (*range(9), 64, 512, 8192))
    assert len(set(given.values()) - {0}) == 48


@pytest.mark.skipif(Matrix(torch.ones(1, 1)).is_plain, reason="this build of torch repacks nothing")
def test_steps_of_many_row_counts_compile_few_products() -> None:
    """Each is 250 KiB and up to a millisecond: 300 steps of 190 row counts made as many, and dropped them again."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "ONEDNN_VERBOSE": "profile_create"}
    done = subprocess.run([sys.executable, "-c", MANY], env=environ, capture_output=True, text=True, check=True)
    products = re.findall("create:cache_miss.*,inner_product,", done.stdout)
    assert 1 <= len(products) <= 30
