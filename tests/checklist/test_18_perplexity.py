"""Point 18: `get_ppl` is torch's mean cross-entropy, whatever the chunks and the prefix cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from device import DEVICE

from engine.async_engine import AsyncEngine
from headrace import PytorchEngineConfig, pipeline

SEQUENCES = [[(7 * n + 3 * m) % 300 + 3 for n in range(length)] for m, length in enumerate((2, 40, 170))]


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32)
    with torch.no_grad():
        return [
            float(torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:])))
            for ids in SEQUENCES
        ]


def test_cached_or_not(pipe: AsyncEngine, expected: list[float]) -> None:
    for _ in range(2):
        assert pipe.get_ppl(SEQUENCES) == pytest.approx(expected, abs=1e-4)


def test_in_chunks_without_a_cache(tiny_model_dir: Path, expected: list[float]) -> None:
    config = PytorchEngineConfig(
        device=DEVICE, num_gpu_blocks=32, block_size=16, max_batch_size=2, max_prefill_token_num=13, enable_prefix_caching=False
    )
    with pipeline(str(tiny_model_dir), backend_config=config) as other:
        assert other.get_ppl(SEQUENCES) == pytest.approx(expected, abs=1e-4)
