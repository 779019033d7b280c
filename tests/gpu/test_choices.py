"""Choices that fork and prompts that are scored, on a GPU: the CPU's answers, with graphs and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_driver import run
from plan_driver import options_for, request
from tiny_models import save_tiny_model

from engine.engine import Engine
from engine.executor import LocalExecutor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPTS = [list(range(5, 75)), [9, 3, 4, 250, 7], [40] * 33]


def families() -> list:
    made = []
    for number, prompt in enumerate(PROMPTS):
        one = request(prompt, seed=9 + number, top_k=0, temperature=1.0, max_new_tokens=20, ignore_eos=True, prompt_logprobs=3)
        made += [replace(one, request_id=f"{number}-{c}", choice=c, family=str(number)) for c in range(3)]
    return made


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("chunk", [9, 8192])
def test_the_gpu_forks_and_scores_as_the_cpu_does(tmp_path: Path, eager: bool, chunk: int) -> None:
    path = save_tiny_model(tmp_path)
    shape = {"block_size": 16, "max_batch_size": 12, "max_prefill_token_num": chunk, "dtype": "float32"}
    outcomes = []
    for device in ("cpu", "cuda"):
        options = options_for(path, **{**shape, "device": device, "eager_mode": eager})
        executor = LocalExecutor(options)
        engine = Engine(executor, options)
        outcomes.append(run(engine, families()))
        assert engine.stats().computed_tokens == sum(len(prompt) + 2 + 3 * 19 for prompt in PROMPTS)
        executor.close()
    theirs, ours = outcomes
    assert {name: one.token_ids for name, one in ours.items()} == {name: one.token_ids for name, one in theirs.items()}
    for number, prompt in enumerate(PROMPTS):
        rows, expected = ours[f"{number}-0"].prompt_logprobs, theirs[f"{number}-0"].prompt_logprobs
        assert rows is not None
        assert expected is not None
        assert [row.token_id for row in rows] == prompt[1:]
        assert [row.logprob for row in rows] == pytest.approx([row.logprob for row in expected], abs=1e-2)
