"""A request's tokens depend on its prompt, its config, its seed and its choice, and on nothing that the engine decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_driver import make_engine, run, token_request

from engine.request import TokenRequest

NEVER = (10**6,)
PROMPTS = [[5 + (i * 37 + n * 13) % 300 for i in range(length)] for n, length in enumerate((1, 16, 33, 50, 80))]


def requests() -> list[TokenRequest]:
    """Drawn with every kind of edit; the first three twice over, as choices of one prompt."""
    made = []
    for number, prompt in enumerate(PROMPTS):
        fields = {"top_k": 0, "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1 + number / 10, "min_new_tokens": 2}
        one = token_request(str(10 * number), prompt, max_new_tokens=40, eos_ids=(2,), **fields)
        made += [
            replace(one, request_id=str(10 * number + c), choice=c, family=str(number)) for c in range(2 if number < 3 else 1)
        ]
    return made


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Each request by itself, without a family."""
    engine = make_engine(tiny_model_dir, block_size=64, num_gpu_blocks=64, max_batch_size=1)
    found = {one.request_id: run(engine, [replace(one, family=None)])[one.request_id].token_ids for one in requests()}
    assert len(set(found.values())) == len(found)
    return found


SHAPES = {
    "blocks of 16": {"block_size": 16, "num_gpu_blocks": 256},
    "blocks of 128": {"block_size": 128, "num_gpu_blocks": 40},
    "two at a time": {"block_size": 16, "num_gpu_blocks": 256, "max_batch_size": 2},
    "chunks of 5": {"block_size": 16, "num_gpu_blocks": 256, "max_prefill_token_num": 5},
    "no cache": {"block_size": 32, "num_gpu_blocks": 128, "enable_prefix_caching": False},
    "a tiny pool": {"block_size": 16, "num_gpu_blocks": 9, "prefill_interval": 1},
    "a tiny pool, chunks, no cache": {
        "block_size": 16,
        "num_gpu_blocks": 9,
        "prefill_interval": 1,
        "max_prefill_token_num": 11,
        "enable_prefix_caching": False,
    },
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_same_seed_gives_the_same_tokens(tiny_model_dir, alone, name, backwards):
    engine = make_engine(tiny_model_dir, **{"max_batch_size": 12, **SHAPES[name]})
    mates = [token_request(str(100 + i), [9 + i] * 40, max_new_tokens=60, top_k=0, eos_ids=NEVER) for i in range(3)]
    order = [*mates, *requests()]
    outputs = run(engine, order[::-1] if backwards else order)
    assert {name: outputs[name].token_ids for name in alone} == alone
    if "tiny" in name:
        assert engine.stats().preemptions > 0, "the pool was large enough: nothing was tested"
