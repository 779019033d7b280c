"""Point 8: a tiny pool changes no text and never livelocks; `eviction_type='copy'` is refused by name until it exists."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_driver import make_engine, run, texts, token_request

from engine.options import resolve
from headrace import PytorchEngineConfig, UnsupportedOption


def test_recompute_in_a_pool_of_eight_blocks(tiny_model_dir: Path) -> None:
    def answers(num_gpu_blocks: int) -> tuple[list[list[int]], int]:
        engine = make_engine(tiny_model_dir, num_gpu_blocks=num_gpu_blocks, block_size=16, max_batch_size=8)
        jobs = [token_request(str(number), [number + 3] * (10 + number), max_new_tokens=60) for number in range(12)]
        found = texts(run(engine, jobs))
        engine.check_integrity()
        return found, engine.stats().preemptions

    calm, none = answers(200)
    squeezed, many = answers(8)
    assert squeezed == calm
    assert (none, many > 0) == (0, True)


def test_one_that_can_never_fit_is_an_error_and_the_rest_goes_on(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, num_gpu_blocks=8, block_size=16, max_batch_size=8)
    done = run(engine, [token_request("0", [3] * 300, max_new_tokens=4), token_request("1", [4], max_new_tokens=4)])
    assert done["0"].error is not None
    assert done["0"].error.code == "kv_capacity"
    assert done["1"].error is None


@pytest.mark.parametrize(("field", "value"), [("eviction_type", "copy"), ("num_cpu_blocks", 8)])
def test_copy_is_refused_by_name(tiny_model_dir: Path, field: str, value: object) -> None:
    with pytest.raises(UnsupportedOption) as refused:
        resolve(tiny_model_dir, PytorchEngineConfig(device="cpu", **{field: value}))  # type: ignore[arg-type]
    assert refused.value.param == field
