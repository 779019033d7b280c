"""Point 14: what this build doesn't have (adapters, swapping to the host, Meta's format) is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.options import resolve
from headrace import InvalidRequest, PytorchEngineConfig, TurbomindEngineConfig, UnsupportedOption, pipeline

REFUSED = [
    TurbomindEngineConfig(model_format="llama"),
    PytorchEngineConfig(adapters={"mine": "/path"}),
]


@pytest.mark.parametrize("config", REFUSED, ids=lambda config: str(config.to_dict()))
def test_refused(tiny_model_dir: Path, config: PytorchEngineConfig | TurbomindEngineConfig) -> None:
    (field,) = config.to_dict()
    with pytest.raises(UnsupportedOption, match=field) as refused:
        pipeline(str(tiny_model_dir), backend_config=config)
    assert refused.value.param == field


@pytest.mark.parametrize("policy", [1, 5, 16])
def test_a_policy_of_no_meaning_is_no_value(policy: int) -> None:
    with pytest.raises(InvalidRequest, match="quant_policy"):
        TurbomindEngineConfig(quant_policy=policy)


def test_off_is_taken(tiny_model_dir: Path) -> None:
    off = TurbomindEngineConfig(quant_policy=0, rope_scaling_factor=0.5, use_logn_attn=False, model_format="hf")
    assert resolve(tiny_model_dir, off).tp == 1
    assert resolve(tiny_model_dir, PytorchEngineConfig(adapters={})).tp == 1
