"""The launches that the GPU ops make, recorded without a GPU, and compiled for devices that are not here.

An op of `kernels.gpu` run on CPU tensors inside `recorded()` computes nothing: every launch it would make is kept, with the
very arguments and configuration of the real call. `compile_for` then runs the whole compiler on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch: the grid and every argument by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of making them."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(kernel=kernel, grid=tuple(grid), arguments=arguments, options=options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class Specialisation(NamedTuple):
    """What a launch is compiled for: launches that agree in it share a binary."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[object]]]


def specialised(launch: Launch) -> Specialisation:
    """Say what the launch itself would be compiled for."""
    found = Specialisation({}, {}, {})
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        whole = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            found.signature[parameter.name] = "constexpr"
            found.constants[index,] = value
            continue
        found.signature[parameter.name] = _type_of(value)
        tensor = isinstance(value, torch.Tensor) and not parameter.do_not_specialize_on_alignment
        if (tensor and value.data_ptr() % 16 == 0) or (whole and value % 16 == 0):
            found.attributes[index,] = [["tt.divisibility", 16]]
    return found


def compile_for(launch: Launch, capability: int) -> Any:
    """Compile a launch for a compute capability (90 = sm_90), specialised as the launch itself would be."""
    signature, constants, attributes = specialised(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
