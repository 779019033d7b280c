"""Real models through the whole engine: the same tokens as transformers, whoever runs beside, whatever is evicted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_driver import make_engine, run, texts, token_request, transformers_greedy
from tiny_models import ARCHITECTURES, save_tiny_model

PREFIX = list(range(40, 78))
"""Two full blocks of 16 that half of the prompts start with."""


def make_prompts() -> list[list[int]]:
    draw = random.Random(5)
    alone = [[draw.randrange(3, 300) for _ in range(length)] for length in (1, 7, 16, 33, 64, 90)]
    return alone + [PREFIX + [draw.randrange(3, 300) for _ in range(length)] for length in (1, 5, 20, 41)]


PROMPTS = make_prompts()
LENGTHS = [30, 9, 17, 25, 30, 4, 21, 30, 12, 28]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A tiny model's directory, and what transformers answers to each prompt."""
    from transformers import AutoModelForCausalLM

    path = save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    reference = AutoModelForCausalLM.from_pretrained(str(path), dtype="float32")
    pairs = zip(PROMPTS, LENGTHS, strict=True)
    return path, [transformers_greedy(reference, prompt, max_new_tokens=length) for prompt, length in pairs]


def requests(**config: Any):
    pairs = zip(PROMPTS, LENGTHS, strict=True)
    return [token_request(str(i), prompt, max_new_tokens=length, **config) for i, (prompt, length) in enumerate(pairs)]


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_batched_equals_transformers_for_each_block_size(model, block_size):
    path, expected = model
    engine = make_engine(path, block_size=block_size, num_gpu_blocks=1024 // block_size, max_batch_size=16)
    assert texts(run(engine, requests())) == expected
    assert engine.stats().preemptions == 0


def test_one_by_one_and_again_from_the_cache_equals_transformers(model):
    path, expected = model
    engine = make_engine(path, block_size=16, num_gpu_blocks=128, max_batch_size=4)
    for one, tokens in zip(requests(), expected, strict=True):
        assert texts(run(engine, [one])) == [tokens]
    before = engine.stats().cached_tokens
    assert texts(run(engine, requests())) == expected
    # Every full block of every prompt is found the second time, but never a prompt's last token.
    assert engine.stats().cached_tokens - before == sum((len(prompt) - 1) // 16 * 16 for prompt in PROMPTS)


def test_preempted_in_a_pool_of_a_few_blocks_equals_transformers(model):
    path, expected = model
    engine = make_engine(path, block_size=16, num_gpu_blocks=7, max_batch_size=8, prefill_interval=1)
    assert texts(run(engine, requests())) == expected
    assert engine.stats().preemptions > 0, "the pool was large enough: nothing was tested"


def test_prompts_in_chunks_of_seven_tokens_equal_transformers(model):
    path, expected = model
    engine = make_engine(path, block_size=16, num_gpu_blocks=64, max_batch_size=6, max_prefill_token_num=7)
    assert texts(run(engine, requests())) == expected


def test_sampled_text_depends_on_the_seed_alone(tiny_model_dir: Path):
    """Not on who runs beside, on chunks, on preemption or on the cache."""
    drawn = requests(top_k=0, temperature=1.0, top_p=0.95)
    roomy = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=64, max_batch_size=16)
    expected = [texts(run(roomy, [one]))[0] for one in drawn]
    assert texts(run(roomy, drawn)) == expected
    tight = make_engine(
        tiny_model_dir,
        block_size=16,
        num_gpu_blocks=12,
        max_batch_size=8,
        max_prefill_token_num=20,
        prefill_interval=1,
        enable_prefix_caching=False,
    )
    assert texts(run(tight, drawn)) == expected
    assert tight.stats().preemptions > 0, "the pool was large enough: half of the claim was not tested"
    other = [
        token_request(str(100 + i), prompt, max_new_tokens=30, top_k=0, temperature=1.0) for i, prompt in enumerate(PROMPTS)
    ]
    assert all(
        ours[:4] != theirs[:4] for ours, theirs in zip(texts(run(roomy, other)), expected, strict=True) if len(theirs) > 4
    )


QUESTIONS = (
    "What is a headrace?", "Name three rivers of Europe.", "Why is the sky blue?", "Write a haiku about water.",
    "Explain recursion to a child.", "What is 17 times 23?", "Who wrote Faust?", "List the planets of the solar system.",
    "Give me a recipe for pancakes.", "What is the capital of Japan?", "How does a water mill work?", "Define entropy.",
    "Translate 'good morning' to French.", "What is photosynthesis?", "Tell me a joke.", "Summarise the plot of Hamlet.",
    "What are prime numbers?", "How do I boil an egg?", "What is a transformer in machine learning?", "Who was Ada Lovelace?",
    "Describe the taste of salt.", "What is the speed of light?", "Write one sentence about autumn.", "How tall is Mount Everest?",
    "What causes tides?", "Explain TCP in one paragraph.", "What is a healthy breakfast?", "Give a synonym of 'quick'.",
    "How do birds fly?", "What is an algorithm?", "Name a famous painting and its painter.", "Why do leaves change colour?",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_smollm2_answers_thirty_two_chats_as_transformers_does():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine.model_info import ModelInfo, locate_model

    path = locate_model("smollm2")
    eos_ids = ModelInfo.read(path).eos_ids
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
        for text in QUESTIONS
    ]
    engine = make_engine(path, block_size=16, num_gpu_blocks=512, max_batch_size=32, session_len=512)
    outputs = texts(
        run(engine, [token_request(str(i), prompt, max_new_tokens=64, eos_ids=eos_ids) for i, prompt in enumerate(prompts)])
    )
    assert engine.stats().cached_tokens > 0, "the system prompt was not shared"
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    near_ties = 0
    for prompt, ours in zip(prompts, outputs, strict=True):
        # Greedy decoding is: each token is the best one after those before it. One pass over prompt and answer asks
        # transformers for all of them at once, and goes on asking after a near-tie, where `generate` would part ways.
        with torch.inference_mode():
            best = model(torch.tensor([[*prompt, *ours]])).logits[0, len(prompt) - 1 :].topk(2)
        for at, (first, second) in enumerate(best.indices.tolist()):
            if at == 64:
                break
            if at == len(ours):
                assert first in eos_ids, f"ended where transformers goes on: {tokenizer.decode(ours)}"
            elif ours[at] != first:
                # Sums in another order may swap two tokens whose logits are equal to the last bits; nothing else may differ.
                assert ours[at] == second
                assert float(best.values[at, 0] - best.values[at, 1]) < 1e-4, (tokenizer.decode(ours), at)
                near_ties += 1
    assert near_ties <= 2
    for prompt, ours in list(zip(prompts, outputs, strict=True))[:3]:
        assert transformers_greedy(model, prompt, max_new_tokens=64) == ours
