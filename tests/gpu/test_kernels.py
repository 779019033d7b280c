"""The Triton kernels on the device, at odd shapes and in every type, against their references."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "op", ["rms_norm", "silu_mul", "rotary", "blocks", "decode", "decode_splits", "prefill", "sampling", "token_masks"]
)
def test_op(op: str, dtype: str) -> None:
    from kernel_checks import run_checks

    checks = list(run_checks([op], [dtype], "cuda"))
    assert checks
    assert [check for check in checks if not check.passed] == []
