"""The Triton kernels, interpreted on the CPU at small odd shapes, against their references.

In a process of its own: TRITON_INTERPRET must be set before Triton is imported, and would spoil the compile checks. float32 and
float16 only: the interpreter computes bfloat16 silently wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
OPS = ["rms_norm", "silu_mul", "rotary", "blocks", "decode", "decode_splits", "prefill", "sampling"]


@pytest.mark.parametrize("op", OPS)
def test_op(op: str) -> None:
    script = ROOT / "tests/support/kernel_checks.py"
    process = subprocess.run(
        [sys.executable, str(script), "--only", op],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    checks = [json.loads(line) for line in process.stdout.splitlines()]
    assert [check for check in checks if not check["passed"]] == [], process.stderr
    assert process.returncode == 0, process.stderr
    assert checks
