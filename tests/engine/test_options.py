"""Options: every field of both configs arrives, or is refused by name."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import kv_cache
from engine.executor import LocalExecutor
from engine.model_info import read_config
from engine.models.spec import ModelSpec
from engine.options import EngineOptions, resolve
from headrace.config import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from headrace.errors import InvalidRequest, KVCapacity, UnsupportedOption


def test_defaults(tiny_model_dir: Path) -> None:
    options = resolve(str(tiny_model_dir), PytorchEngineConfig(device="cpu"))
    assert options == EngineOptions(
        model_path=str(tiny_model_dir),
        tp=1,
        session_len=1024,
        max_batch_size=128,
        block_size=64,
        num_blocks=0,
        max_prefill_token_num=8192,
        prefill_interval=16,
        cache_max_entry_count=0.8,
        enable_prefix_caching=True,
        quant_policy=0,
        rope_scaling_factor=0.0,
        use_logn_attn=False,
        dtype="float32",
        device="cpu",
        eager_mode=False,
        template_name=None,
    )
    assert EngineOptions.from_dict(options.to_dict()) == options
    assert resolve(str(tiny_model_dir)).session_len == 1024


def test_every_pytorch_field_arrives(tiny_model_dir: Path) -> None:
    given: dict[str, Any] = {
        "model_name": "chatml",
        "tp": 2,
        "session_len": 100,
        "max_batch_size": 3,
        "prefill_interval": 5,
        "block_size": 16,
        "num_gpu_blocks": 9,
        "max_prefill_token_num": 77,
        "cache_max_entry_count": 0.25,
        "enable_prefix_caching": False,
        "quant_policy": 8,
        "rope_scaling_factor": 2.0,
        "use_logn_attn": True,
        "dtype": "bfloat16",
        "device": "cpu",
        "eager_mode": True,
    }
    refused = {"eviction_type", "num_cpu_blocks", "adapters"}
    assert {field.name for field in dataclasses.fields(PytorchEngineConfig)} == set(given) | refused
    renamed = {"model_name": "template_name", "num_gpu_blocks": "num_blocks"}
    options = resolve(str(tiny_model_dir), PytorchEngineConfig(**given))
    for name, value in given.items():
        assert getattr(options, renamed.get(name, name)) == value, name


@pytest.mark.parametrize("kind", [PytorchEngineConfig, TurbomindEngineConfig])
def test_a_batch_size_of_none_goes_by_the_device(tiny_model_dir: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve(str(tiny_model_dir), kind(max_batch_size=None)).max_batch_size == 128
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve(str(tiny_model_dir), kind()).max_batch_size == 128, "the document's"


# An H200; an A100 of 40 GB; a 4090 beside an A6000; a T4; a driver that fails; one that doesn't say (MIG); no GPU after all; no such program.
@pytest.mark.parametrize(
    ("said", "status", "count"),
    [
        ("143771", 0, 1024),
        ("40960", 0, 512),
        ("49140\n24564", 0, 256),
        ("15360", 0, 128),
        ("NVIDIA-SMI has failed", 9, 1024),
        ("[N/A]", 0, 1024),
        ("", 0, 1024),
        (None, 0, 1024),
    ],
)
def test_a_batch_size_of_none_goes_by_the_memory_of_the_smallest_gpu(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, status: int, count: int
) -> None:
    if said is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve(str(tiny_model_dir), PytorchEngineConfig(max_batch_size=None)).max_batch_size == count


def test_turbomind_fields_arrive(tiny_model_dir: Path) -> None:
    config = TurbomindEngineConfig(
        model_name="chatml", model_format="hf", tp=2, session_len=100, max_batch_size=3, cache_max_entry_count=0.3
    )
    options = resolve(str(tiny_model_dir), config)
    assert (options.template_name, options.tp, options.session_len, options.max_batch_size) == ("chatml", 2, 100, 3)
    assert (options.cache_max_entry_count, options.num_blocks) == (0.3, 0)
    assert resolve(str(tiny_model_dir), TurbomindEngineConfig(cache_max_entry_count=12)).num_blocks == 12
    assert resolve(str(tiny_model_dir), TurbomindEngineConfig()).cache_max_entry_count == 0.5


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (PytorchEngineConfig(eviction_type="copy"), "eviction_type"),
        (PytorchEngineConfig(num_cpu_blocks=4), "num_cpu_blocks"),
        (PytorchEngineConfig(adapters={"a": "/x"}), "adapters"),
        (TurbomindEngineConfig(model_format="llama"), "model_format"),
    ],
)
def test_what_this_build_cant_do_is_refused_by_name(tiny_model_dir: Path, config: Any, field: str) -> None:
    with pytest.raises(UnsupportedOption, match=field) as refused:
        resolve(str(tiny_model_dir), config)
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"session_len": 1025}, "session_len"), ({"tp": 3, "device": "cpu"}, "tp")],
)
def test_what_the_model_cant_do_is_refused_by_name(tiny_model_dir: Path, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(str(tiny_model_dir), PytorchEngineConfig(**fields))
    assert refused.value.param == param


@pytest.mark.parametrize("config", [{"tp": 1}, "pytorch", GenerationConfig()], ids=lambda config: type(config).__name__)
def test_what_is_no_engine_config_is_refused_by_name(tiny_model_dir: Path, config: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"backend_config is a .* not {type(config).__name__}") as refused:
        resolve(str(tiny_model_dir), config)
    assert refused.value.param == "backend_config"


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this host has a CUDA device")
def test_cuda_without_a_device_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="no CUDA device"):
        resolve(str(tiny_model_dir), PytorchEngineConfig(device="cuda"))


def options(path: Path, **fields: Any) -> EngineOptions:
    return resolve(str(path), PytorchEngineConfig(**{"device": "cpu", **fields}))


def test_the_pool_is_what_was_asked_or_what_can_be_needed(tiny_model_dir: Path) -> None:
    assert LocalExecutor(options(tiny_model_dir, num_gpu_blocks=5)).num_blocks == 5
    small = options(tiny_model_dir, max_batch_size=2, session_len=100)
    assert LocalExecutor(small).num_blocks == 2 * 2  # two sessions of two blocks: more could never be used
    report = LocalExecutor(small).report()
    assert report["kv_pool"] == 4 * report["kv_block"]
    assert report["kv_block"] == 2 * 2 * 2 * 64 * 16 * 4  # k and v, layers, heads, positions, head dim, fp32
    assert report["weights"] > 100_000


def test_the_pool_on_a_cpu_is_capped_but_holds_one_session(tiny_model_dir: Path) -> None:
    auto = options(tiny_model_dir)
    one = kv_cache.CPU_POOL_BYTES // 10
    assert kv_cache.choose_num_blocks(auto, one_block=one, free=1 << 50) == 16  # 1024 tokens of session, over the cap
    assert kv_cache.choose_num_blocks(auto, one_block=one // 8, free=1 << 50) == 80
    assert kv_cache.choose_num_blocks(auto, one_block=one, free=one * 10) == 8  # 0.8 of what is free


def test_a_cpu_pool_takes_no_memory_before_it_is_used(tiny_model_dir: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    LocalExecutor(options(tiny_model_dir, num_gpu_blocks=1)).close()  # what a first engine loads for good is no pool
    before = resident()
    executor = LocalExecutor(options(tiny_model_dir, num_gpu_blocks=(1 << 30) // 32768))
    assert executor.report()["kv_pool"] == 1 << 30
    assert resident() - before < 256 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_is_aligned_zeros(tiny_model_dir: Path, dtype: torch.dtype) -> None:
    spec = ModelSpec.read(read_config(tiny_model_dir))
    caches = kv_cache.allocate(spec, num_blocks=3, block_size=16, dtype=dtype, device=torch.device("cpu"))
    assert len(caches) == 2
    for tensor in (half for cache in caches for half in cache.tensors):
        assert tensor.shape == (3, 2, 16, 16)
        assert tensor.is_contiguous()
        assert tensor.dtype == dtype
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()


def test_a_pool_that_doesnt_fit_is_refused_before_it_is_allocated(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="at most") as refused:
        LocalExecutor(options(tiny_model_dir, num_gpu_blocks=1 << 40))
    assert refused.value.param == "num_gpu_blocks"
    with pytest.raises(KVCapacity):
        kv_cache.choose_num_blocks(options(tiny_model_dir), one_block=1 << 30, free=1 << 20)
