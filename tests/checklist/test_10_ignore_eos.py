"""Point 10: `ignore_eos=True, max_new_tokens=k` gives exactly k tokens, and 'length'."""

from __future__ import annotations

from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from headrace import GenerationConfig

END = 2


@pytest.mark.parametrize("count", [1, 2, 33])
def test_exactly_so_many(pipe: AsyncEngine, count: int) -> None:
    # The bias makes the end token certain where it isn't ignored.
    eager: dict[str, Any] = {"max_new_tokens": count, "logit_bias": {END: 100}}
    for sampled in ({}, {"top_k": 0, "random_seed": 4}):
        answer: Any = pipe("water", GenerationConfig(ignore_eos=True, **eager, **sampled))
        assert (len(answer.token_ids), answer.generate_token_len, answer.finish_reason) == (count, count, "length")
        assert END not in answer.token_ids
    ended: Any = pipe("water", GenerationConfig(**eager))
    assert (ended.generate_token_len, ended.finish_reason, ended.stop_detail) == (0, "stop", "eos")
