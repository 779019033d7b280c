"""Point 18: `get_ppl` is torch's mean cross-entropy in nats, whatever the chunks and the prefix cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import SMALL

from engine.async_engine import AsyncEngine
from headrace import GenerationConfig, InvalidRequest, PytorchEngineConfig, pipeline

TEXTS = [[(7 * n + length) % 300 + 3 for n in range(length)] for length in (2, 17, 64, 300)]


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32)
    found = []
    for ids in TEXTS:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        found.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item())
    return found


def test_mean_cross_entropy(pipe: AsyncEngine, expected: list[float]) -> None:
    assert pipe.get_ppl(TEXTS) == pytest.approx(expected, abs=1e-4)
    assert pipe.get_ppl(TEXTS[1]) == pytest.approx(expected[1:2], abs=1e-4)


def test_a_cached_prefix_changes_nothing(pipe: AsyncEngine) -> None:
    text = "the mill wheel turns while water 0123456789 runs " * 12
    ids = list(pipe.frontend.tokenizer.encode_raw(text))
    assert len(ids) > 32
    fresh = pipe.get_ppl(ids)
    for _ in range(2):
        answer: Any = pipe(text, GenerationConfig(max_new_tokens=2), do_preprocess=False)
    assert answer.cached_tokens > 0
    assert pipe.get_ppl([ids, ids]) == pytest.approx(fresh * 2, abs=1e-5)


@pytest.mark.slow
def test_chunks_change_nothing(tiny_model_dir: Path, expected: list[float]) -> None:
    config = PytorchEngineConfig(**{**SMALL.to_dict(), "max_prefill_token_num": 32})
    with pipeline(str(tiny_model_dir), backend_config=config) as chunked:
        assert chunked.get_ppl(TEXTS) == pytest.approx(expected, abs=1e-4)


def test_one_token_has_no_perplexity(pipe: AsyncEngine) -> None:
    with pytest.raises(InvalidRequest):
        pipe.get_ppl([5])
