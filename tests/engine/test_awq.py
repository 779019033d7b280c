"""Checkpoints in AWQ's 4 bits against transformers with the weights that the numbers stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import transformers_greedy
from plan_driver import generate, options_for, request
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from torch import Tensor

from engine import awq
from engine.executor import LocalExecutor
from engine.models.loading import load_decoder
from engine.options import resolve
from engine.parallel import SingleRank
from headrace import GenerationConfig, InvalidRequest, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from headrace.errors import ModelLoadError

PROMPTS = [list(range(5, 75)), [9, 3, 4, 250, 7], [40] * 33]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(numbers: Tensor) -> Tensor:
    """Pack rows of numbers from 0 to 15, eight a word, one after the other: in Python's whole numbers, which know no sign bit."""
    rows = []
    for row in numbers.tolist():
        packed = [sum(row[first + place] << 4 * index for index, place in enumerate(ORDER)) for first in range(0, len(row), 8)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def stored(weight_OI: Tensor, group: int, stem: str) -> tuple[dict[str, Tensor], Tensor]:
    """Round a matrix to 4 bits: the tensors that are stored, and the weights [O, I] that they stand for."""
    outputs, inputs = weight_OI.shape
    grouped = weight_OI.T.reshape(inputs // group, group, outputs).double()
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.double()).round().clamp(0, 15)
    numbers = (grouped / scales.double()[:, None] + zeros[:, None]).round().clamp(0, 15)
    meant = ((numbers - zeros[:, None]) * scales.double()[:, None]).reshape(inputs, outputs).T.float().contiguous()
    flat = numbers.reshape(inputs, outputs).long()
    return {f"{stem}qweight": words(flat), f"{stem}qzeros": words(zeros.long()), f"{stem}scales": scales}, meant


def quantise(path: Path, group: int, *, keep: str = "lm_head embed") -> dict[str, Tensor]:
    """Turn a model's directory into an AWQ one; give the weights that it stands for."""
    tensors, meant = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if tensor.ndim == 1 or any(part in name for part in keep.split()):
            tensors[name] = meant[name] = tensor
            continue
        width = tensor.shape[1] if group == -1 else group
        parts, meant[name] = stored(tensor, width, name.removesuffix("weight"))
        tensors |= parts
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", "modules_to_not_convert": None,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return meant


@pytest.fixture(scope="module", params=[("llama", 16), ("qwen2", 16), ("qwen3", -1)], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A directory in 4 bits, and what transformers answers with the weights that it stands for."""
    from transformers import AutoModelForCausalLM

    architecture, group = request.param
    path = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
    reference = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    meant = quantise(path, group)
    reference.load_state_dict(meant, strict=False)
    return path, [transformers_greedy(reference, prompt, max_new_tokens=16, ignore_eos=True) for prompt in PROMPTS]


def test_tokens_of_transformers(model: tuple[Path, list[list[int]]]) -> None:
    path, expected = model
    executor = LocalExecutor(options_for(path))
    assert generate(executor, [request(prompt) for prompt in PROMPTS], steps=16, block_size=64)[0] == expected


@pytest.mark.parametrize(("group", "keep"), [(16, "lm_head embed"), (-1, "embed")])
def test_two_ranks_read_their_own_shares(tmp_path: Path, group: int, keep: str) -> None:
    """56 columns of the MLP a rank: a share begins in the middle of a group of 16. The second time the head is in 4 bits, too."""
    path = save_tiny_model(tmp_path, vocab_size=408)
    quantise(path, group, keep=keep)
    answers = []
    for tp in (1, 2):
        config = PytorchEngineConfig(device="cpu", tp=tp, max_batch_size=4, num_gpu_blocks=32)
        with pipeline(str(path), backend_config=config) as pipe:
            gen = GenerationConfig(top_k=1, max_new_tokens=12, ignore_eos=True)
            answers.append([response.token_ids for response in pipe(["One is", "Two is a"], gen_config=gen)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(8, 16, 16), (24, 2048, 128), (40, 4096, 4096), (16, 96, 32)])
def test_numbers(outputs: int, inputs: int, group: int) -> None:
    torch.manual_seed(outputs)
    parts, meant = stored(torch.randn(outputs, inputs), group, "")
    packed = awq.Packed(parts["qweight"], parts["qzeros"], parts["scales"])
    assert torch.equal(awq.unpack(packed, group=group, dtype=torch.float32), meant)
    assert torch.equal(awq.unpack(packed, group=group, dtype=torch.bfloat16), meant.bfloat16())


def test_what_was_not_quantised_is_read_as_it_is(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    meant = quantise(path, 16, keep="lm_head embed down_proj")
    decoder = load_decoder(path, dtype=torch.float32, device=torch.device("cpu"), group=SingleRank(), max_positions=64)
    block = decoder.layers[1]
    for name, matrix, inputs in (("mlp.down_proj", block.down.weight, 112), ("self_attn.o_proj", block.output.weight, 64)):
        torch.testing.assert_close(matrix(torch.eye(inputs)).T, meant[f"model.layers.1.{name}.weight"])


@pytest.fixture
def copy(model: tuple[Path, list[list[int]]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model[0], tmp_path / "model"))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(copy: Path, part: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, str(copy / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"up_proj\.{part}"):
        LocalExecutor(options_for(copy))


def test_a_missing_matrix_is_named_as_itself(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, str(copy / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"no tensor 'model.embed_tokens.weight'"):
        LocalExecutor(options_for(copy))


def test_groups_of_another_size_than_stored_are_noticed(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    quantise(path, 16)
    config = json.loads((path / "config.json").read_text())
    for size, named in ((8, "qzeros"), (128, "groups of 128")):
        config["quantization_config"]["group_size"] = size
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match=named):
            LocalExecutor(options_for(path))


def test_the_documents_model_format(copy: Path, tiny_model_dir: Path) -> None:
    for fits, path in (("awq", copy), (None, copy), ("hf", tiny_model_dir)):
        given: Any = fits
        assert resolve(path, TurbomindEngineConfig(model_format=given)).tp == 1
    for wrong, path in (("hf", copy), ("awq", tiny_model_dir)):
        given = wrong
        with pytest.raises(InvalidRequest, match="leave model_format at None") as refused:
            resolve(path, TurbomindEngineConfig(model_format=given))
        assert refused.value.param == "model_format"
