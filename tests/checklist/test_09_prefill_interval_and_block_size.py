"""Point 9: `prefill_interval` shows in the schedule; `block_size` changes no text."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_driver import make_engine, run, texts, token_request
from engine_on_fake import run as run_on_fake
from fake_device import request


def steps_with_admissions(prefill_interval: int) -> list[int]:
    jobs = [request(str(n), [3 + n, 4], max_new_tokens=5 + 3 * n, ignore_eos=True) for n in range(24)]
    _, _, device, _ = run_on_fake(jobs, num_blocks=400, max_batch_size=8, prefill_interval=prefill_interval)
    return [plan.step for plan in device.plans if plan.admitted]


def test_interval() -> None:
    eager, patient = steps_with_admissions(1), steps_with_admissions(1000)
    assert len(eager) > len(patient)  # patient ones come in together, when half of the batch has gone


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[list[int]]:
    return answers(tiny_model_dir, 64)


def answers(path: Path, block_size: int) -> list[list[int]]:
    engine = make_engine(path, block_size=block_size, num_gpu_blocks=4096 // block_size, max_batch_size=4)
    jobs = [token_request(str(n), [(7 * n + i) % 300 + 3 for i in range(30 * n + 1)], max_new_tokens=20) for n in range(6)]
    return texts(run(engine, jobs))


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_size(tiny_model_dir: Path, expected: list[list[int]], block_size: int) -> None:
    assert answers(tiny_model_dir, block_size) == expected
