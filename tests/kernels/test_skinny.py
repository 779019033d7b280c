"""The skinny GEMM: its reference against the ops it replaces, and its kernels interpreted at small odd shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.skinny_gemm import serves, skinny_linear

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_reference_is_the_ops_it_replaces(rows: int, bias: bool) -> None:
    x, weight, norm = torch.randn(rows, 63).double(), torch.randn(20, 63).double(), torch.randn(63).double()
    residual = torch.randn(rows, 20).double()
    b = torch.randn(20).double() if bias else None
    plain = F.linear(reference.rms_norm(x, norm, 1e-5), weight, b)
    torch.testing.assert_close(skinny_linear(x, weight, b, norm_I=norm, eps=1e-5), plain)
    torch.testing.assert_close(skinny_linear(x, weight, b, norm_I=norm, eps=1e-5, gated=True), reference.silu_mul(plain))
    torch.testing.assert_close(skinny_linear(x, weight, b, residual_TO=residual), F.linear(x, weight, b) + residual)


def test_reference_rounds_once() -> None:
    x, weight, residual = (torch.randn(shape).bfloat16() for shape in ((2, 300), (8, 300), (2, 8)))
    exact = F.linear(x.double(), weight.double()) + residual.double()
    assert torch.equal(skinny_linear(x, weight, residual_TO=residual), exact.bfloat16())
    assert serves(1000, weight)


def test_kernels_interpreted() -> None:
    pytest.importorskip("triton")
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/skinny_checks.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(lines) >= 24, process.stderr
    assert [line for line in lines if not line["passed"]] == []
    assert process.returncode == 0, process.stderr
