"""What is compiled while weights are read is what the steps then launch: the GPU's launches, recorded without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has replaced the compiler in this process", allow_module_level=True)

from kernel_launches import Launch, recorded, specialised
from plan_driver import options_for, request
from tiny_models import save_tiny_model

from engine import compile_ahead, runner
from engine.executor import LocalExecutor
from engine.model_info import read_config
from engine.models.spec import ModelSpec
from engine.plan import Admission, PlanRow, StepPlan
from kernels.gpu.attention import single_row_counts

CPU = torch.device("cpu")


@contextmanager
def gpu_launches() -> Iterator[list[Launch]]:
    """Let CPU tensors take the way of CUDA tensors, up to the launches."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", new=True, create=True),
        mock.patch.object(runner, "_to_host", lambda tensor: tensor),
        mock.patch.object(runner._Launched, "_mark"),
        recorded() as launches,
    ):
        yield launches


def binaries(launches: list[Launch]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for launch in launches:
        key = (launch.name, *specialised(launch), tuple(sorted(launch.options.items())))
        if key not in found:
            found.append(key)
    return found


def run_steps(executor: LocalExecutor, **config: Any) -> None:
    """A step of prompts, one of single tokens, one of both."""
    prompts = [tuple(range(5, 75)), (9, 3, 4), (8, 9, 10, 11)]

    def admit(slot: int) -> Admission:
        return Admission(
            slot, request(prompts[slot], ignore_eos=True, eos_ids=(2,), **config), prompts[slot], (2 * slot, 2 * slot + 1)
        )

    def prompt(slot: int) -> PlanRow:
        return PlanRow(slot, 0, len(prompts[slot]), True, 0, ())

    singles = tuple(PlanRow(slot, len(prompts[slot]), 1, True, 1, ()) for slot in range(2))
    executor.launch(StepPlan(step=0, admitted=(admit(0), admit(1)), rows=(prompt(0), prompt(1))))
    executor.launch(StepPlan(step=1, admitted=(), rows=singles))
    executor.launch(StepPlan(step=2, admitted=(admit(2),), rows=(*singles, prompt(2))))


@pytest.mark.parametrize(
    ("architecture", "dtype", "overrides", "config"),
    [
        ("llama", "bfloat16", {}, {}),
        ("mistral", "float16", {"sliding_window": 24}, {}),
        ("qwen3", "float32", {}, {}),
        ("qwen3", "bfloat16", {}, {"quant_policy": 8}),
        ("llama", "bfloat16", {}, {"rope_scaling_factor": 2.0, "use_logn_attn": True}),
    ],
)
def test_no_step_finds_anything_left_to_compile(
    tmp_path: Path, architecture: str, dtype: str, overrides: dict[str, Any], config: dict[str, Any]
) -> None:
    path = save_tiny_model(tmp_path, architecture, **overrides)
    options = options_for(path, dtype=dtype, block_size=64, **config)
    executor = LocalExecutor(options)
    spec = ModelSpec.read(read_config(path))
    with gpu_launches() as ahead:
        calls: list[Callable[[], object]] = list(compile_ahead._calls(spec, options, CPU))
        for call in calls:
            call()
    with gpu_launches() as launched:
        run_steps(executor, top_k=1)
        run_steps(executor, top_k=40, top_p=0.8, temperature=0.8)
    executor.close()
    known, needed = binaries(ahead), binaries(launched)
    assert len({name for name, *_ in needed}) >= 10, needed
    missing = [key for key in needed if key not in known]
    assert missing == []
    # Decode attention of other row counts, and a plan for it.
    assert len(known) - len(needed) <= len(single_row_counts(CPU, spec.num_kv_heads, 1 if options.int8_kv else 2))


def test_what_a_call_raises_is_raised_where_its_result_is_waited_for() -> None:
    compiling = compile_ahead.CompileAhead(mock.Mock(), mock.Mock(), device=CPU)
    compiling.wait()
    failed: compile_ahead.Future[None] = compile_ahead.Future()
    failed.set_exception(RuntimeError("no such instruction"))
    compiling._futures.append(failed)
    with pytest.raises(RuntimeError, match="no such instruction"):
        compiling.wait()
