"""Finding models and reading checkpoints, whole, sharded and broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from plan_driver import generate, options_for, request
from safetensors.torch import load_file, save_file

from engine.executor import LocalExecutor
from engine.model_info import ModelInfo, locate_model
from headrace.errors import ModelLoadError

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def shard(path: Path) -> dict[str, str]:
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, str(path / file))
    (path / "model.safetensors").unlink()
    where = {name: file for file, part in halves.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_sharded_files_are_the_whole_one(copy: Path, tiny_model_dir: Path) -> None:
    expected = generate(LocalExecutor(options_for(tiny_model_dir)), [request(PROMPT)], steps=5, block_size=64)[0]
    shard(copy)
    assert generate(LocalExecutor(options_for(copy)), [request(PROMPT)], steps=5, block_size=64)[0] == expected


def test_bf16_weights_run_and_answer_alike(copy: Path) -> None:
    tokens, outputs = generate(LocalExecutor(options_for(copy, dtype="bfloat16")), [request(PROMPT)], steps=5, block_size=64)
    assert len(tokens[0]) == 5
    assert not any(output.invalid for output in outputs)


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard(copy)
    (copy / "model-2.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-2\.safetensors"):
        LocalExecutor(options_for(copy))


def test_a_missing_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, str(copy / "model.safetensors"))
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj"):
        LocalExecutor(options_for(copy))


def test_a_tensor_of_another_shape_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelLoadError, match="gate_proj"):
        LocalExecutor(options_for(copy))


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_a_broken_file_is_named(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        LocalExecutor(options_for(copy))


def test_pickles_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickles"):
        LocalExecutor(options_for(copy))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("/no/such/dir", "no directory"),
        ("./no-such", "no directory"),
        ("", "no directory"),
        ("owner/model", "HF_HUB_OFFLINE"),
        ("no such model", "neither a directory nor a hub id"),
    ],
)
def test_what_is_no_model_is_one_clear_line(given: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match=named) as refused:
        locate_model(given)
    assert "\n" not in refused.value.message
    assert refused.value.param == "model_path"


def test_config_errors_name_the_file(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        ModelInfo.read(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        ModelInfo.read(copy)
    with pytest.raises(ModelLoadError, match="is a file"):
        locate_model(copy / "model.safetensors")


def test_eos_ids_come_from_all_three_files(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    assert ModelInfo.read(copy).eos_ids == (7, 8, 9, 2)  # 2: the tokenizer's <|im_end|>


def test_a_stretched_rope_lengthens_the_session(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    (copy / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    assert ModelInfo.read(copy).max_length == 4096
    assert options_for(copy, session_len=4096).session_len == 4096
