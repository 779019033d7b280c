"""Point 19: four choices of a long prompt take less than half more KV than one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_driver import make_engine, token_request

from engine.async_engine import AsyncEngine
from engine.request import TokenRequest
from headrace import GenerationConfig

PROMPT = [(7 * n) % 300 + 3 for n in range(600)]


def most_blocks(path: Path, count: int) -> int:
    engine = make_engine(path, num_gpu_blocks=250, block_size=16, max_batch_size=8)
    leader = token_request("0", PROMPT, max_new_tokens=30, ignore_eos=True, top_k=0)
    fields = {name: getattr(leader, name) for name in leader.__dataclass_fields__}
    for choice in range(count):
        engine.add(TokenRequest(**{**fields, "request_id": str(choice), "choice": choice, "family": "0"}))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats().blocks_used)
    engine.check_integrity()
    return most


def test_blocks(tiny_model_dir: Path) -> None:
    one = most_blocks(tiny_model_dir, 1)
    assert one >= len(PROMPT) // 16
    assert most_blocks(tiny_model_dir, 4) < 1.5 * one


def test_the_prompt_is_computed_once(pipe: AsyncEngine) -> None:
    config = GenerationConfig(n=4, max_new_tokens=6, top_k=0, temperature=1.0, random_seed=3)
    before = pipe.report()["stats"]["computed_tokens"]
    answer: Any = pipe("the mill wheel turns while the water runs " * 15, config)
    computed = pipe.report()["stats"]["computed_tokens"] - before
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.input_token_len > 100
    assert computed < answer.input_token_len + 4 * 10
