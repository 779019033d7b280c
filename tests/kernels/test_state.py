"""The kernels that read and write the engine's state on the device, interpreted on the CPU, against their references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_interpreted() -> None:
    """In a process of its own: TRITON_INTERPRET must be set before Triton is imported."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/state_checks.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.stdout == "passed\n", process.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has replaced the compiler")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_for_devices_that_are_not_here(arch: int) -> None:
    from kernel_launches import compile_for, recorded

    from kernels.gpu import state
    from kernels.state import SingleRows

    whole = torch.int32
    with recorded() as launches:
        out = SingleRows.allocate(4, 10, torch.device("cpu"))
        state.lay_out_singles(
            torch.zeros(4, 4, dtype=whole), torch.zeros(3, 50, dtype=whole), torch.zeros(3, 10, dtype=whole), 16, out
        )
        index = torch.zeros(4, dtype=torch.int64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            state.hold_back(
                torch.zeros(4, 99, dtype=dtype), index, index, torch.zeros(3, dtype=whole), torch.zeros(3, 8, dtype=whole)
            )
            state.store_tokens(index, torch.zeros(4, dtype=dtype), index, index, torch.zeros(3, 50, dtype=whole))
    assert len(launches) == 7
    for launch in launches:
        compile_for(launch, arch)
