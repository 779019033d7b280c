"""The kernels of a step of few rows compile for every device that we serve: with dependent launch where it exists, without elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has replaced the compiler in this process", allow_module_level=True)

from kernel_launches import Launch, compile_for, recorded

from kernels.gpu import launch_ahead, rms_norm, rotary, silu_mul, skinny_gemm

# Bytes of shared memory that one program may take, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def _linear(rows: int, width: int, inner: int, dtype: torch.dtype, *, norm: bool, gated: bool) -> None:
    x = torch.zeros(rows, inner, dtype=dtype)
    weight = torch.zeros(width * (2 if gated else 1), inner, dtype=dtype)
    residual = None if norm else torch.zeros(rows, width, dtype=dtype)
    skinny_gemm.skinny_linear(x, weight, None, norm_I=x[0] if norm else None, eps=1e-5, residual_TO=residual, gated=gated)


def launches(capability: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Launch]:
    options = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    with mock.patch.object(launch_ahead, "options", return_value=options), recorded() as made:
        _linear(rows, 14336, 256, dtype, norm=True, gated=True)
        _linear(rows, 6144, 256, dtype, norm=True, gated=False)
        _linear(rows, 4096, 256, dtype, norm=False, gated=False)
        x = torch.zeros(rows, 576, dtype=dtype)
        rms_norm.add_rms_norm(x, x.clone(), x[0], 1e-5)
        silu_mul.silu_mul(x)
        q, k, v = torch.zeros(rows, 8, 64, dtype=dtype).split([4, 2, 2], dim=1)
        cache, index = torch.zeros(4, 2, 16, 64, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
        rotary.rotary_kv_write(q, k, v, torch.zeros(9, 64), index, index, cache, cache, None, None, 1e-6)
    yield from made


@pytest.mark.parametrize(("capability", "rows"), [(80, 1), (80, 64), (90, 2), (90, 16), (90, 64), (100, 1), (100, 64)])
def test_bfloat16(capability: int, rows: int) -> None:
    for launch in launches(capability, rows):
        compiled = compile_for(launch, capability)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], launch.name
        ptx = compiled.asm["ptx"]
        assert ("griddepcontrol.wait" in ptx) == ("griddepcontrol.launch_dependents" in ptx) == (capability >= 90), launch.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types(dtype: torch.dtype) -> None:
    for launch in launches(80, 1, dtype):
        assert compile_for(launch, 80).asm["cubin"]


def test_only_weights_are_read_before_the_wait() -> None:
    """One row of bfloat16: each thread fetches 16 bytes of 4 rows of the weight; what the kernel ahead writes is read behind the wait."""
    (gated, plain, added, *small) = launches(90, 1)
    for launch, before in ((gated, 2 * 4 + 1), (plain, 4 + 1), (added, 4)):
        head, _, tail = compile_for(launch, 90).asm["ptx"].partition("griddepcontrol.wait")
        assert head.count("ld.global") == before, launch.name
        assert "st.global" not in head
        assert tail.count("ld.global") > before
    for launch in small:
        head = compile_for(launch, 90).asm["ptx"].partition("griddepcontrol.wait")[0]
        assert "ld.global" not in head, launch.name
        assert "st.global" not in head, launch.name


def test_few_rows_stay_in_registers_and_more_go_to_the_tensor_cores() -> None:
    (launch, *_) = launches(90, 1)
    assert "st.local" not in compile_for(launch, 90).asm["ptx"]
    (norm, launch, *_) = launches(90, 64)
    assert norm.name == "_rms_norm_kernel"
    assert "wgmma.mma_async" in compile_for(launch, 90).asm["ptx"]


def _compiled_as(launch: Launch) -> tuple[object, ...]:
    """What a launch is compiled for: types, constants, and which integers Triton knows to be multiples of 16."""
    known: list[object] = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            known.append((value.dtype, value.data_ptr() % 16 == 0))
        elif parameter.is_constexpr or value is None or isinstance(value, float):
            known.append(value if parameter.is_constexpr else type(value))
        else:
            known.append(None if parameter.do_not_specialize else (value == 1, value % 16 == 0))
    return (launch.name, *known, *sorted(launch.options.items()))


@pytest.mark.parametrize(
    ("rows", "hidden", "inner"), [*((rows, 512, 1792) for rows in (1, 2, 16, 32, 64)), (1, 576, 1536), (2, 576, 1536)]
)
def test_what_is_prepared_is_what_a_model_launches(rows: int, hidden: int, inner: int) -> None:
    """A kernel that was prepared for nothing would be compiled while the weights wait."""
    dtype, device = torch.bfloat16, torch.device("cpu")
    weights = {"gated": torch.zeros(2 * inner, hidden, dtype=dtype), "added": torch.zeros(hidden, inner, dtype=dtype)}
    x, h = torch.zeros(rows, hidden, dtype=dtype), torch.zeros(rows, inner, dtype=dtype)
    with recorded() as real:
        skinny_gemm.skinny_linear(x, weights["gated"], x[0], norm_I=x[0], eps=1e-6, residual_TO=None, gated=True)
        skinny_gemm.skinny_linear(h, weights["added"], None, norm_I=None, eps=0.0, residual_TO=x, gated=False)
    layer = {"rows": rows, "dtype": dtype, "device": device}
    with recorded() as prepared:
        skinny_gemm.prepare(**layer, width=inner, inner=hidden, norm=True, gated=True, bias=True, residual=False)
        skinny_gemm.prepare(**layer, width=hidden, inner=inner, norm=False, gated=False, bias=False, residual=True)
    wanted = [_compiled_as(launch) for launch in real if launch.name != "_rms_norm_kernel"]
    assert [_compiled_as(launch) for launch in prepared] == wanted
    assert len(wanted) == 2
