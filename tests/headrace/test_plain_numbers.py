"""Numbers that numpy or torch made are taken for what they are, and travel as JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from headrace import GenerationConfig, InvalidRequest, PytorchEngineConfig, TurbomindEngineConfig


def test_they_become_pythons() -> None:
    config = GenerationConfig(
        max_new_tokens=np.int64(5),
        temperature=np.float32(0.5),
        top_k=torch.tensor(3),  # type: ignore[arg-type]  # as a caller writes it
        ignore_eos=np.bool_(True),
        random_seed=np.uint64(2**63 + 1),
        stop_token_ids=np.array([1, 2]),  # type: ignore[arg-type]  # as a caller writes it
        bad_token_ids=[np.int32(7)],  # type: ignore[arg-type]  # as a caller writes it
    )
    plain = {"max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "ignore_eos": True, "random_seed": 2**63 + 1}
    assert json.loads(json.dumps(config.to_dict())) == {**plain, "stop_token_ids": [1, 2], "bad_token_ids": [7]}
    assert config == GenerationConfig(**plain, stop_token_ids=(1, 2), bad_token_ids=(7,))


@pytest.mark.parametrize("kind", [PytorchEngineConfig, TurbomindEngineConfig])
def test_of_an_engines_config(kind: Any) -> None:
    config = kind(session_len=np.int64(99), cache_max_entry_count=np.float64(0.5), tp=np.int32(1))
    assert type(config.session_len) is int
    assert json.dumps(config.to_dict())


@pytest.mark.parametrize("wrong", [np.array([1, 2]), np.float64("nan"), np.int64(-1), np.float32(2.5)])
def test_what_is_wrong_stays_wrong(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="max_new_tokens"):
        GenerationConfig(max_new_tokens=wrong)
