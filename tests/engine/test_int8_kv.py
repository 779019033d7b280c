"""A KV cache of 8-bit integers, against transformers with a cache that rounds what it is given by the definition."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import make_engine, run, texts, token_request
from plan_driver import generate, options_for, request
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from engine import kv_cache
from engine.executor import LocalExecutor
from engine.model_info import read_config
from engine.models.loading import load_decoder
from engine.models.spec import ModelSpec
from engine.options import resolve
from engine.parallel import SingleRank
from engine.profile import _step_of
from headrace import GenerationConfig, InvalidRequest, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from kernels.attention import UNPACKED_POSITIONS

PROMPTS = [list(range(5, 75)), [9, 3, 4, 250, 7], [40] * 33, list(range(300, 316))]
STEPS = 12


class RoundingLayer(DynamicLayer):
    """Keeps keys and values as multiples of a 127th of each head's largest magnitude."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


def rounded(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-20) / 127  # the padding token is all zeros
    return torch.round(x / step) * step


def model_of(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)


def rounding_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [RoundingLayer() for _ in range(model.config.num_hidden_layers)]
    return cache


def logits(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
    """Run a model; its argument has another name from transformers 5.2x on, and the old one warns there."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(ids, **{name: cache}).logits[0]


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    cache, ids, made = rounding_cache(model), torch.tensor([prompt]), []
    for _ in range(STEPS):
        made.append(int(logits(model, ids, cache)[-1].argmax()))
        ids = torch.tensor([made[-1:]])
    return made


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def test_logits_are_those_of_rounded_keys_and_values(path: Path) -> None:
    decoder = load_decoder(path, dtype=torch.float32, device=torch.device("cpu"), group=SingleRank(), max_positions=128)
    sizes = {"num_blocks": 2, "block_size": 64, "dtype": torch.float32, "device": torch.device("cpu"), "int8": True}
    caches = kv_cache.allocate(decoder.spec, **sizes)
    inputs = _step_of(70, options_for(path, max_prefill_token_num=70, session_len=70), device=torch.device("cpu"))
    prompt, model = torch.tensor(PROMPTS[0]), model_of(path)
    with torch.inference_mode():
        ours = decoder.forward(inputs._replace(tokens_T=prompt, sampled_R=None), caches)
        rounding = logits(model, prompt[None], rounding_cache(model))
        exact = logits(model, prompt[None])
    # A number on the border of two steps may be rounded either way, which the other kind of error dwarfs.
    error = (ours - rounding).norm()
    assert error < 0.05 * (exact - rounding).norm()
    assert (exact - rounding).norm() < 0.05 * exact.norm()


def test_greedy_tokens_batched_and_chunked(path: Path) -> None:
    model = model_of(path)
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    for block_size, chunk, overlap in ((64, 10_000, False), (16, 10_000, True), (32, 7, False)):
        executor = LocalExecutor(options_for(path, block_size=block_size, quant_policy=8))
        requests = [request(prompt) for prompt in PROMPTS]
        tokens, _ = generate(executor, requests, steps=STEPS, block_size=block_size, chunk=chunk, overlap=overlap)
        assert tokens == expected, (block_size, chunk)


def test_preempted_shared_and_found_again(tiny_model_dir: Path) -> None:
    """Blocks that are copied for choices, evicted, or found by their prefix carry their scales along."""
    prompts = [[*range(40, 78), *range(5, 5 + 7 * number)] for number in range(6)]

    def requests() -> list[Any]:
        return [token_request(str(i), ids, max_new_tokens=20 + 4 * i, ignore_eos=True) for i, ids in enumerate(prompts)]

    roomy = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=128, max_batch_size=8, quant_policy=8)
    expected = texts(run(roomy, requests()))
    assert texts(run(roomy, requests())) == expected
    assert roomy.stats().cached_tokens > 0
    narrow = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=8, max_batch_size=8, prefill_interval=1, quant_policy=8)
    assert texts(run(narrow, requests())) == expected
    assert narrow.stats().preemptions > 0


def test_choices_of_a_prompt(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=64, max_batch_size=8, quant_policy=8)
    prompt = list(range(9, 30))  # its last block is not full: each choice gets a copy
    together = [replace(token_request("7", prompt, max_new_tokens=8, top_k=0), request_id=str(n), choice=n) for n in range(3)]
    alone = [texts(run(engine, [one]))[0] for one in together]
    assert texts(run(engine, together)) == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_it_takes_the_bytes_that_it_says(tiny_model_dir: Path) -> None:
    spec = ModelSpec.read(read_config(tiny_model_dir))
    sizes = {"block_size": 16, "dtype": torch.bfloat16}
    caches = kv_cache.allocate(spec, num_blocks=3, device=torch.device("cpu"), int8=True, **sizes)
    held = sum(tensor.nbytes for cache in caches for tensor in cache.tensors)
    assert held == 3 * kv_cache.block_bytes(spec, int8=True, **sizes)
    report = LocalExecutor(options_for(tiny_model_dir, num_gpu_blocks=5, quant_policy=8)).report()
    assert report["kv_block"] == 2 * 2 * 2 * 64 * (16 + 4)  # k and v, layers, heads, positions, a byte each and a scale


def test_room_is_made_for_the_pages_that_a_gpu_unpacks(tiny_model_dir: Path) -> None:
    spec = ModelSpec.read(read_config(tiny_model_dir))
    options = options_for(tiny_model_dir, quant_policy=8)
    position = 2 * 2 * 16 * 2  # k and v, heads, head dim, bfloat16
    assert kv_cache.unpacked_bytes(spec, options, dtype=torch.bfloat16) == UNPACKED_POSITIONS * position
    longer = replace(options, session_len=100_000)
    assert kv_cache.unpacked_bytes(spec, longer, dtype=torch.bfloat16) == (100_000 + 64) * position
    assert kv_cache.unpacked_bytes(spec, replace(options, quant_policy=0), dtype=torch.bfloat16) == 0


@pytest.mark.parametrize("policy", [4, 8])
def test_both_numbers_of_the_document_are_taken(tiny_model_dir: Path, policy: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve(tiny_model_dir, TurbomindEngineConfig(quant_policy=policy)).quant_policy == 8
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["quant_policy_by_document"] * (
        policy == 4
    )


@pytest.mark.parametrize("policy", [4, 8.0, False, "8"])
def test_there_are_no_four_bits(tiny_model_dir: Path, policy: Any) -> None:
    with pytest.raises(InvalidRequest, match="quant_policy"):
        PytorchEngineConfig(quant_policy=policy)
    assert resolve(tiny_model_dir, PytorchEngineConfig()).quant_policy == 0


def test_two_ranks(tiny_model_dir: Path) -> None:
    config = {"device": "cpu", "max_batch_size": 4, "num_gpu_blocks": 32, "quant_policy": 8}
    gen, answers = GenerationConfig(top_k=1, max_new_tokens=12), []
    for tp in (1, 2):
        with pipeline(str(tiny_model_dir), backend_config=PytorchEngineConfig(tp=tp, **config)) as pipe:
            answers.append([response.token_ids for response in pipe(["One is", "Two is a"], gen_config=gen)])
    assert answers[0] == answers[1]
