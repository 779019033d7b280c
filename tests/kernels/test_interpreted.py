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
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
OPS = [
    "rms_norm",
    "add_rms_norm",
    "one_shot",
    "one_shot_add_rms_norm",
    "two_shot",
    "share_add_rms_norm",
    "gather_columns",
    "silu_mul",
    "rotary q",
    "rotary kv",
    "copy_blocks",
    "swap_blocks",
    "decode_attention",
    "prefill_attention",
    "sample",
    "token_masks",
]


@pytest.fixture(scope="module")
def checks() -> list[dict[str, Any]]:
    """Every check's line, from one process: importing torch and Triton costs more than most of the checks."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/kernel_checks.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == (0 if all(line["passed"] for line in lines) else 1), process.stderr
    return lines


@pytest.mark.parametrize("op", OPS)
def test_op(op: str, checks: list[dict[str, Any]]) -> None:
    of_op = [check for check in checks if check["op"] == op]
    assert of_op
    assert [check for check in of_op if not check["passed"]] == []


def test_no_op_is_left_out(checks: list[dict[str, Any]]) -> None:
    assert {check["op"] for check in checks} == set(OPS)
