"""Point 20: the report shows where memory goes; `cache_max_entry_count` is monotone; too many blocks are refused before they are allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device import DEVICE

from engine import kv_cache
from engine.async_engine import AsyncEngine
from engine.options import resolve
from engine.state_table import StateTable, table_bytes
from headrace import InvalidRequest, PytorchEngineConfig, pipeline


def test_the_report(pipe: AsyncEngine) -> None:
    budget = pipe.report()["engine"]
    assert budget["kv_pool"] == budget["num_blocks"] * budget["kv_block"]
    assert budget["weights"] > 0
    assert budget["requests"] > 0
    assert "GiB" in budget["text"]


def test_the_fraction_is_monotone(tiny_model_dir: Path) -> None:
    def blocks(fraction: float) -> int:
        config = PytorchEngineConfig(device=DEVICE, cache_max_entry_count=fraction)
        return kv_cache.choose_num_blocks(resolve(tiny_model_dir, config), one_block=1 << 20, free=1 << 30)

    counts = [blocks(fraction) for fraction in (0.05, 0.1, 0.4, 0.8, 0.99)]
    assert counts == sorted(counts)
    assert len(set(counts)) == 5


def test_too_many_blocks(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="at most") as refused:
        pipeline(str(tiny_model_dir), backend_config=PytorchEngineConfig(device=DEVICE, num_gpu_blocks=1 << 40))
    assert refused.value.param == "num_gpu_blocks"


def test_too_many_requests_at_a_time(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="lower max_batch_size or session_len") as refused:
        pipeline(str(tiny_model_dir), backend_config=PytorchEngineConfig(device=DEVICE, max_batch_size=1 << 32))
    assert refused.value.param == "max_batch_size"


def test_what_requests_take_is_what_the_report_says() -> None:
    sizes = {"num_slots": 7, "session_len": 1000, "block_size": 64}
    table = StateTable(**sizes, device=torch.device("cpu"))
    tensors = [table.token_ids_SL, table._block_tables_SP, *table.singles]
    real = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert table_bytes(**sizes) == pytest.approx(real, rel=0.01)
