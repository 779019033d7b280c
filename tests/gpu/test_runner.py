"""The runner on a GPU: the CPU's tokens, graphs equal to eager steps, and no wait for the device inside a launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_driver import generate, options_for, request
from tiny_models import save_tiny_model

from engine.executor import LocalExecutor
from engine.plan import PlanRow, StepPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPTS = [list(range(5, 75)), [9, 3, 4, 250, 7], [40] * 33, list(range(300, 316)), [8]]
STEPS = 12


@contextmanager
def running(path: Path, **fields: Any) -> Iterator[LocalExecutor]:
    executor = LocalExecutor(options_for(path, **{"device": "cuda", "dtype": "float32", **fields}))
    yield executor
    executor.close()


def mixed() -> list[Any]:
    """Greedy rows, sampled rows and rows that ask for every edit."""
    return [
        request(PROMPTS[0]),
        request(PROMPTS[1], top_k=0, temperature=1.0, seed=2**64 - 5, top_p=0.9, min_p=0.01),
        request(PROMPTS[2], repetition_penalty=1.3, presence_penalty=0.5, logit_bias={9: 2.0}, logprobs=5),
        request(PROMPTS[3], bad_sequences=((4,), (5, 6), (7, 8, 9)), ignore_eos=True, eos_ids=(2,), min_new_tokens=3),
        request(PROMPTS[4], top_k=7, temperature=0.7, seed=3, choice=2, logprobs=0),
    ]


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("llama", {"tie_word_embeddings": True}), ("mistral", {"sliding_window": 24}), ("qwen2", {}), ("qwen3", {})],
)
def test_the_gpu_gives_the_tokens_of_the_cpu(tmp_path: Path, architecture: str, overrides: dict[str, Any]) -> None:
    path = save_tiny_model(tmp_path, architecture, **overrides)
    expected, reference = generate(LocalExecutor(options_for(path)), mixed(), steps=STEPS, block_size=64)
    for fields, chunk in (({"eager_mode": True}, 10_000), ({}, 10_000), ({"block_size": 16}, 7)):
        with running(path, **fields) as executor:
            tokens, outputs = generate(
                executor, mixed(), steps=STEPS, block_size=fields.get("block_size", 64), chunk=chunk, overlap=True
            )
        assert tokens == expected, fields
        assert not any(output.invalid for output in outputs)
        if chunk > len(PROMPTS[0]):  # else the rows sample in other steps
            got = [one for one in outputs[0].logprobs if one]
            want = [one for one in reference[0].logprobs if one]
            assert len(got) == len(want) == 2
            for ours, theirs in zip(got, want, strict=True):
                assert ours.token_id == theirs.token_id
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-2)
                assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graphs_are_bit_equal_to_eager_steps(tmp_path: Path, dtype: str) -> None:
    path = save_tiny_model(tmp_path)
    outcomes = []
    for eager in (True, False):
        with running(path, dtype=dtype, eager_mode=eager) as executor:
            # One after the other on one executor: graphs of several sizes, and padding rows over what a wider step left.
            outcomes.append(
                [generate(executor, mixed()[:count], steps=STEPS, block_size=64, overlap=True)[0] for count in (5, 2, 3, 1)]
            )
    assert outcomes[0] == outcomes[1]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype; it found a wait already
@pytest.mark.parametrize("eager", [True, False])
def test_a_launch_never_waits_for_the_device(tmp_path: Path, eager: bool) -> None:
    with running(save_tiny_model(tmp_path), eager_mode=eager) as executor:
        rows = mixed()
        generate(executor, rows, steps=4, block_size=64)  # compiles, and leaves the slots at 4 tokens
        plan = StepPlan(
            step=9,
            admitted=(),
            rows=tuple(PlanRow(slot, len(one.prompt_ids) + 3, 1, True, 4, ()) for slot, one in enumerate(rows)),
        )
        executor.launch(plan).result()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = executor.launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(step.result().tokens) == len(rows)


def test_the_pool_takes_its_share_of_what_is_free(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    with running(path, num_gpu_blocks=0, max_batch_size=128, cache_max_entry_count=0.1) as executor:
        report = executor.report()
        assert report["activations"] > 0
        assert executor.num_blocks == 128 * 16  # all that 128 sessions of 1024 tokens can use
        assert report["kv_pool"] < 0.1 * report["free_before_pool"]
