"""The skinny GEMM kernels held to their reference in float64: interpreted on a CPU, or on a GPU.

`python tests/support/skinny_checks.py [--device cpu|cuda] [--dtypes float32 …]` prints a JSON line a check and fails if one failed.
Interpreting wants TRITON_INTERPRET=1 set before the process starts, and cannot do bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
from checking import Check
from kernel_cases import relative_error
from torch import Tensor

from kernels import reference_linear
from kernels.gpu import skinny_gemm
from kernels.gpu.skinny_gemm import SkinnyShape

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Case(NamedTuple):
    """A linear layer: outputs (of each half where gated) and inputs, and what stands around it."""

    rows: int
    width: int
    inner: int
    norm: bool = False
    gated: bool = False
    bias: bool = False
    residual: bool = False


SMALL = (
    Case(1, 1, 16),
    Case(1, 63, 528, bias=True),
    Case(1, 10, 2064, norm=True),
    Case(2, 7, 1040, norm=True, gated=True, bias=True),
    Case(1, 9, 304, residual=True),
    Case(2, 5, 144, bias=True, residual=True),
    Case(3, 33, 256, bias=True, residual=True),
    Case(17, 20, 512, norm=True, gated=True, bias=True),
)
LARGE = (
    *SMALL,
    Case(1, 6144, 4096, norm=True),
    Case(1, 14336, 4096, norm=True, gated=True),
    Case(1, 4096, 14336, residual=True),
    Case(2, 4096, 4096, residual=True),
    Case(2, 14336, 4096, norm=True, gated=True),
    *(Case(rows, 6144, 4096, norm=True) for rows in (3, 16, 33, 64)),
    *(Case(rows, 14336, 4096, norm=True, gated=True) for rows in (16, 31, 50, 64)),
    *(Case(rows, 4096, 14336, residual=True) for rows in (7, 32, 64)),
    *(Case(rows, 1152, 768, norm=True, gated=True, bias=True) for rows in (1, 2, 5, 64)),
)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    outputs = case.width * (2 if case.gated else 1)
    x = draw(case.rows, case.inner + 16)[:, : case.inner]  # rows with a stride
    weight = (draw(outputs, case.inner).float() / case.inner**0.5).to(dtype)
    return (
        x,
        weight,
        {
            "bias_O": draw(outputs) if case.bias else None,
            "norm_I": 1 + draw(case.inner) / 4 if case.norm else None,
            "residual_TO": draw(case.rows, case.width) if case.residual else None,
        },
    )


def check(case: Case, dtype: torch.dtype, device: str, shape: SkinnyShape | None = None) -> Iterator[Check]:
    """One launch against float64, and against itself a second time: equal to the last bit."""
    x, weight, around = _inputs(case, dtype, device)
    wide = {name: None if tensor is None else tensor.double() for name, tensor in around.items()}
    expected = reference_linear.skinny_linear(x.double(), weight.double(), eps=1e-5, gated=case.gated, **wide)
    residual = around.pop("residual_TO")

    def run() -> Tensor:
        given = None if residual is None else residual.clone()
        return skinny_gemm.skinny_linear(
            x, weight, around["bias_O"], norm_I=around["norm_I"], eps=1e-5, residual_TO=given, gated=case.gated, shape=shape
        )

    name = f"{case} {dtype} {'' if shape is None else tuple(shape)}"
    first = run()
    yield Check("skinny", name, relative_error(first, expected), TOLERANCE[dtype])
    yield Check("skinny", name + " again", float((run() != first).sum()), 0.0)


def run_checks(dtypes: Sequence[str], device: str) -> Iterator[Check]:
    """Every case in every type, in memory where everything uninitialised is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for dtype, case in itertools.product((getattr(torch, name) for name in dtypes), SMALL if device == "cpu" else LARGE):
            weight = torch.empty(case.width, case.inner, dtype=dtype, device=device)
            if skinny_gemm.serves(case.rows, weight):
                yield from check(case, dtype, device)
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> int:
    """Print a line a check; the exit status says whether all passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    arguments = parser.parse_args()
    failed = 0
    for line in run_checks(arguments.dtypes, arguments.device):
        print(json.dumps({**line._asdict(), "passed": line.passed}), flush=True)
        failed += not line.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
