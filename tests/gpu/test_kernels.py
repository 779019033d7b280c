"""The Triton kernels on the device, at odd shapes and in every type, against their references.

Nearly all the time goes into compiling, so a test is one op in one type at one attention shape: `-n 14` (pytest-xdist) runs
them side by side where there are the cores.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ATTENTION_SHAPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = ["float32", "float16", "bfloat16"]


def check(op: str, dtype: str, *shapes: tuple[int, int, int, int]) -> None:
    from kernel_checks import run_checks

    checks = list(run_checks([op], [dtype], "cuda", shapes))
    assert checks
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_attention(op: str, shape: tuple[int, int, int, int], dtype: str) -> None:
    check(op, dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["decode_shares", "rms_norm", "all_reduce", "silu_mul", "rotary", "blocks"])
def test_op(op: str, dtype: str) -> None:
    check(op, dtype)


@pytest.mark.parametrize("op", ["sampling", "token_masks"])
def test_op_on_logits(op: str) -> None:
    check(op, "float32")


def test_automata() -> None:
    from automata_checks import check_kernels

    check_kernels(torch.device("cuda"))
