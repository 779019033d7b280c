"""A prompt's own log-probabilities on real models: those of transformers, whatever is cached, chunked, evicted or runs beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import make_engine, run, token_request
from fake_device import FakeDevice, FakeOptions, request, score_alone
from tiny_models import save_tiny_model

from engine import scorer
from engine.engine import Engine

PROMPTS = [[5 + (i * 37 + n * 11) % 300 for i in range(length)] for n, length in enumerate((1, 2, 16, 17, 45, 90, 130))]
NEVER = (10**6,)
PREFIX = [7, 9, 11, 13] * 10


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import AutoModelForCausalLM

    path = save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return path, AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)


def reference(model: Any, prompt: list[int]) -> torch.Tensor:
    """Raw log-softmax at each position but the last, [P-1, V]."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1].float(), dim=-1)


def check(model: Any, prompt: list[int], rows: Any, k: int) -> None:
    expected = reference(model, prompt)
    assert [row.token_id for row in rows] == prompt[1:]
    for row, position in zip(rows, expected, strict=True):
        assert row.logprob == pytest.approx(float(position[row.token_id]), abs=1e-4)
        best = position.topk(k)
        assert [token for token, _ in row.top] == best.indices.tolist()
        assert [value for _, value in row.top] == pytest.approx(best.values.tolist(), abs=1e-4)


SHAPES = {
    "whole": {"num_gpu_blocks": 64},
    "in chunks": {"num_gpu_blocks": 64, "max_prefill_token_num": 7},
    "chunks of one": {"num_gpu_blocks": 64, "max_prefill_token_num": 1, "max_batch_size": 3},
    "preempted": {"num_gpu_blocks": 10, "prefill_interval": 1, "max_prefill_token_num": 20},
    "large blocks": {"num_gpu_blocks": 32, "block_size": 64, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("name", SHAPES)
def test_they_are_those_of_transformers(model, name):
    path, theirs = model
    engine = make_engine(path, **{"block_size": 16, "max_batch_size": 8, **SHAPES[name]})
    wanted = [
        token_request(str(i), prompt, max_new_tokens=20, prompt_logprobs=3, eos_ids=NEVER) for i, prompt in enumerate(PROMPTS)
    ]
    mates = [token_request(str(50 + i), prompt[:60], max_new_tokens=40, eos_ids=NEVER) for i, prompt in enumerate(PROMPTS)]
    outputs = run(engine, [one for pair in zip(wanted, mates, strict=True) for one in pair])
    for index, prompt in enumerate(PROMPTS):
        check(theirs, prompt, outputs[str(index)].prompt_logprobs, 3)
        assert outputs[str(50 + index)].prompt_logprobs is None
    if name == "preempted":
        assert engine.stats().preemptions > 0, "the pool was large enough: nothing was tested"


def test_the_prefix_cache_is_filled_but_not_read(model):
    path, theirs = model
    engine = make_engine(path, block_size=16, num_gpu_blocks=64, max_batch_size=8)
    prompt = PREFIX + PROMPTS[4]
    for name, k, cached in (("1", 0, 0), ("2", 20, 0), ("3", None, 80)):
        output = run(engine, [token_request(name, prompt, max_new_tokens=3, ignore_eos=True, prompt_logprobs=k)])[name]
        assert output.cached_tokens == cached
        if k is None:
            assert output.prompt_logprobs is None
        else:
            check(theirs, prompt, output.prompt_logprobs, k)


def test_logits_of_a_long_prompt_are_never_there_all_at_once(tiny_model_dir: Path):
    engine = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=64, max_batch_size=4)
    runner = engine._executor._rank.runner
    head, seen = runner._head, []

    def counting(hidden_RD: torch.Tensor, mine: slice | None = None) -> torch.Tensor:
        seen.append(len(hidden_RD))
        return head(hidden_RD, mine)

    runner._head = counting
    prompt = [5 + i % 290 for i in range(700)]
    rows = run(engine, [token_request("0", prompt, max_new_tokens=1, prompt_logprobs=1)])["0"].prompt_logprobs
    assert len(rows) == 699
    assert sum(seen) == 700
    assert max(seen) == scorer.LEAST_AT_ONCE


def test_a_stream_gets_them_once_with_its_first_tokens_and_so_does_choice_0_alone():
    opts = FakeOptions(max_prefill_token_num=16)
    engine = Engine(FakeDevice(32, opts), opts)
    prompt = [3 + i % 20 for i in range(40)]
    for choice in range(2):
        engine.add(
            request(
                f"c{choice}",
                prompt,
                family="f",
                choice=choice,
                stream=True,
                max_new_tokens=4,
                ignore_eos=True,
                prompt_logprobs=0,
            )
        )
    reports: dict[str, list[Any]] = {"c0": [], "c1": []}
    while engine.has_work:
        for output in engine.step():
            reports[output.request_id].append(output.prompt_logprobs)
    first, *rest = reports["c0"]
    assert [(row.token_id, row.logprob) for row in first] == score_alone(prompt)
    assert rest == [None] * 3
    assert reports["c1"] == [None] * 4
