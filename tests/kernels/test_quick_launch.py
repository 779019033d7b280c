"""A launch that goes past Triton's look-up runs the binary that Triton would have found, with the arguments that Triton would have given."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has replaced the compiler in this process", allow_module_level=True)

import triton
import triton.language as tl
from kernel_launches import Launch, Specialisation, specialised
from step_launches import STEPS, launches_of_a_step
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels.gpu.quick_launch import QuickKernel, ceil_div, power_of_2, quick
from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.gpu.silu_mul import silu_mul
from kernels.gpu.skinny_gemm import skinny_linear
from kernels.gpu.token_masks import allow_only

OPTIONS = ("num_warps", "num_stages", "launch_pdl")


class Binary:
    """Stands for what Triton compiled for one launch; keeps what it is launched with afterwards."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.again: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 3

        def run(*args: Any) -> None:
            names = [param.name for param in self.launch.kernel.params]
            arguments = dict(zip(names, args, strict=True))
            self.again.append(Launch(kernel=self.launch.kernel, grid=grid, arguments=arguments, options=self.launch.options))

        return run


@pytest.fixture
def binaries() -> Iterator[list[Binary]]:
    """Every launch that Triton looks up is kept, and answered with a binary."""
    made: list[Binary] = []

    def run(kernel: JITFunction[Any], *args: Any, grid: tuple[int, ...], warmup: bool, **meta: Any) -> Binary:
        assert not warmup
        options = {name: meta.pop(name) for name in OPTIONS if name in meta}
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **meta}
        made.append(Binary(Launch(kernel=kernel, grid=grid, arguments=arguments, options=options)))
        return made[-1]

    with mock.patch.object(JITFunction, "run", run):
        yield made
    for kernel in quick_kernels():
        kernel._known.clear()


def quick_kernels() -> list[QuickKernel]:
    modules = [module for name, module in sys.modules.items() if name.startswith("kernels.gpu.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, QuickKernel)]


def other_launches(rows: int) -> None:
    x_TD = torch.zeros(rows, 256, dtype=torch.bfloat16)
    rms_norm(x_TD, x_TD[0], 1e-6)
    add_rms_norm(x_TD.clone(), x_TD, x_TD[0], 1e-6)
    for first in (0, 1):  # the second starts at 4 bytes
        rms_norm(torch.zeros(rows * 256 + 1)[first : first + rows * 256].view(rows, 256), torch.zeros(256), 1e-6)
    silu_mul(torch.zeros(rows, 512, dtype=torch.bfloat16))
    weight_OI = torch.zeros(96, 256, dtype=torch.bfloat16)
    for bias, residual in ((None, None), (torch.zeros(96, dtype=torch.bfloat16), x_TD[:, :96].contiguous())):
        skinny_linear(x_TD, weight_OI, bias, norm_I=None, eps=0.0, residual_TO=residual, gated=False)
    allow_only(torch.zeros(rows, 500), torch.arange(rows), torch.zeros(rows, 16, dtype=torch.int32))


def test_a_known_launch_is_the_one_that_triton_would_make(binaries: list[Binary]) -> None:
    for singles, longer, context in STEPS * 2:
        launches_of_a_step(singles, longer, context)
        other_launches(singles)
    again = [(binary.launch, launch) for binary in binaries for launch in binary.again]
    assert len(again) > 3 * len(binaries)
    for first, later in again:
        assert specialised(later) == specialised(first), first.name
        assert set(later.arguments) == set(first.arguments), first.name
    # As few look-ups as there are binaries: Triton's own facts, no finer ones.
    assert {binary.launch.name for binary in binaries} >= {"_dot_kernel", "_stream_kernel", "_lay_out_kernel"} - {
        "_lay_out_kernel"
    }
    found: list[tuple[str, Specialisation, dict[str, Any]]] = []
    for binary in binaries:
        key = (binary.launch.name, specialised(binary.launch), binary.launch.options)
        assert key not in found, key
        found.append(key)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p_any"])
def _plain_kernel(p_x, p_any, size, n, eps, p_none, BLOCK: tl.constexpr):
    tl.store(p_x, size + n + eps)


def test_what_makes_another_binary() -> None:
    kernel = quick(_plain_kernel)
    x, meta = torch.zeros(64), {"BLOCK": 64, "num_warps": 4}
    args = (x, x, 32, 7, 0.5, None)
    kind = kernel.kind(args, meta)
    same = [(x[4:], x[1:], 48, 16, 2.5, None), (x, x, 1 << 20, 1, 1.0, None)]
    others = [
        (x[1:], x, 32, 7, 0.5, None), (x.double(), x, 32, 7, 0.5, None), (x, x.long(), 32, 7, 0.5, None), (x, x, 33, 7, 0.5, None),
        (x, x, 1, 7, 0.5, None), (x, x, 1 << 40, 7, 0.5, None), (x, x, 32, 1 << 31, 0.5, None), (x, x, 32, 7, 1, None),
        (x, x, 32, 7, 0.5, x), (x, x, True, 7, 0.5, None),
    ]  # fmt: skip
    assert [kernel.kind(one, meta) for one in same] == [kind] * 2
    kinds = [kernel.kind(one, meta) for one in others]
    assert kind not in kinds
    assert len(set(kinds)) == len(kinds)
    assert kernel.kind(args, {**meta, "num_warps": 8}) != kind != kernel.kind(args, {**meta, "BLOCK": 32})


@triton.jit(do_not_specialize=["c", "d"], do_not_specialize_on_alignment=["e", "f"])
def _any_kernel(a, b, c, d, e, f, C: tl.constexpr):
    pass


def test_launches_of_a_kind_are_one_to_triton() -> None:
    """Random arguments, against Triton's own way from arguments to what is compiled."""
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(_any_kernel.signature, _any_kernel.params, backend)
    kernel, x, draw = quick(_any_kernel), torch.zeros(64), random.Random()
    values: list[Any] = [
        True, False, 0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**31 + 16, 2**40, 2**63 - 1, None,
        0.5, 1.0, 0.0, x, x[1:], x[4:], x[:0], x.bool(), x.long(), x.int()[1:], x.bfloat16(), torch.nn.Parameter(x),
    ]  # fmt: skip
    found: dict[Any, str] = {}
    hits = 0
    for _ in range(30_000):
        args = (x, *draw.choices(values, k=5))
        meta = {"C": draw.choice([1, 2]), "num_warps": draw.choice([4, 8])}
        _, specialisation, options = bind(*args, **meta)
        kind, compiled = kernel.kind(args, meta), f"{specialisation} {options}"
        hits += kind in found
        assert found.setdefault(kind, compiled) == compiled, args
    assert hits > 1000


def test_threads_with_one_kind_wait_for_the_first() -> None:
    """Triton's binary is found by others as soon as it is compiled, before it is loaded: the second launch would have no function."""
    kernel, x = quick(_plain_kernel), torch.zeros(64)
    looked_up, loaded, seen = [], threading.Event(), []

    class Loading:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args: seen.append((loaded.is_set(), args[-1]))

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **meta: Any) -> Loading:
        looked_up.append(meta["BLOCK"])
        time.sleep(0.2)
        loaded.set()
        return Loading()

    with mock.patch.object(JITFunction, "run", run), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: kernel[(1,)](x, x, 32, 7, 0.5, None, BLOCK=64), range(4)))
    assert looked_up == [64]
    assert seen == [(True, 64)] * 3


def test_sizes() -> None:
    for size in (1, 2, 3, 31, 32, 33, 128256):
        assert power_of_2(size) == triton.next_power_of_2(size)
        assert ceil_div(size, 32) == triton.cdiv(size, 32)
