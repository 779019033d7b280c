"""Point 7: the same seed gives the same text, whatever the batch mates, the preemptions and `max_batch_size`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_driver import make_engine, run, texts, token_request

from engine.async_engine import AsyncEngine
from engine.request import TokenRequest
from headrace import GenerationConfig

SEEDED = GenerationConfig(max_new_tokens=24, top_k=0, temperature=1.2, random_seed=2**63 + 9, ignore_eos=True)


def test_twice_and_in_company(pipe: AsyncEngine) -> None:
    alone = pipe("water", SEEDED)
    assert pipe("water", SEEDED).text == alone.text  # type: ignore[union-attr]
    crowd = pipe(["mill", *["wheel " * 40] * 20, "water"], SEEDED)
    assert crowd[-1].text == alone.text  # type: ignore[index, union-attr]
    other = GenerationConfig(**{**SEEDED.to_dict(), "random_seed": 1})
    assert pipe("water", other).text != alone.text  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> list[list[int]]:
    return texts(run(make_engine(tiny_model_dir, num_gpu_blocks=100, block_size=16, max_batch_size=1), requests()))


def requests() -> list[TokenRequest]:
    # They may end by themselves: where all lengths are known beforehand they are planned for, and nothing is preempted.
    sampled: dict[str, Any] = {"top_k": 0, "temperature": 1.0}
    return [token_request(str(number), [5 + number] * 20, max_new_tokens=60, **sampled) for number in range(12)]


def test_preempted(tiny_model_dir: Path, alone: list[list[int]]) -> None:
    engine = make_engine(tiny_model_dir, num_gpu_blocks=8, block_size=16, max_batch_size=8)
    assert texts(run(engine, requests())) == alone
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("width", [2, 6])
def test_any_batch_size(tiny_model_dir: Path, alone: list[list[int]], width: int) -> None:
    assert texts(run(make_engine(tiny_model_dir, num_gpu_blocks=100, block_size=16, max_batch_size=width), requests())) == alone
