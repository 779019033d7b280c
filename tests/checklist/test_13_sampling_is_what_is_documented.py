"""Point 13: penalties equal transformers', bad words never appear, and the draws follow a numpy reference, alone and combined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import sampling_inputs
from plan_driver import request
from sampling_truth import chi_square, edited, kept

from engine.async_engine import AsyncEngine
from engine.plan import Admission
from engine.sampler import Sampler
from engine.state_table import SampledRows, StateTable
from headrace import GenerationConfig
from kernels.sampling import sample

DRAWS = 100_000
VOCAB = 60
HISTORY = (3, 3, 7, 9, 11, 3, 12, 12)
PROMPT_LEN = 5
END = 2
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 20, "min_p": 0.08},
    {"top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.85, "min_p": 0.04},
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]),
]


def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_hundred_thousand_draws_follow_the_filters(filters: dict[str, Any], device: str) -> None:
    asked = {"top_k": 0, "temperature": 1.0, **filters}
    inputs = sampling_inputs(DRAWS, **asked, device=device)
    tokens = sample(logits().to(device).expand(DRAWS, VOCAB).contiguous(), inputs).tokens_R.cpu().numpy()
    assert chi_square(tokens, kept(logits().double().numpy(), GenerationConfig(**asked))) < 1


def test_the_statistic_finds_a_small_mistake() -> None:
    inputs = sampling_inputs(DRAWS, top_p=0.8)
    tokens = sample(logits().expand(DRAWS, VOCAB).contiguous(), inputs).tokens_R.numpy()
    x = logits().double().numpy()
    for wrong in ({"top_p": 0.75}, {"top_p": 0.85}, {"top_p": 0.8, "temperature": 1.03}):
        assert chi_square(tokens, kept(x, GenerationConfig(**{"top_k": 0, "temperature": 1.0, **wrong}))) > 1, wrong


ALL = GenerationConfig(
    bad_token_ids=(20, 21),
    logit_bias={3: 1.5, 30: 2.0, 20: 50.0},
    repetition_penalty=1.4,
    presence_penalty=0.3,
    frequency_penalty=0.25,
    min_new_tokens=30,
    temperature=1.2,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
)


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_order_of_operations(device: str) -> None:
    """Through the engine's sampler with every field on: the edited logits, then 100,000 draws in rounds of 4000 slots."""
    slots = 4000
    one = request(
        HISTORY[:PROMPT_LEN], eos_ids=(END,), bad_sequences=tuple((token,) for token in ALL.bad_token_ids), **ALL.to_dict()
    )
    admitted = [Admission(slot, type(one)(**{**fields_of(one), "seed": 10**15 + slot}), HISTORY, (0,)) for slot in range(slots)]
    place = torch.device(device)
    table = StateTable(num_slots=slots, session_len=16, block_size=16, device=place)
    sampler = Sampler(num_slots=slots, vocab_size=VOCAB, device=place)
    table.admit(admitted)
    sampler.admit(admitted)
    expected = edited(logits().double().numpy(), ALL, history=HISTORY, prompt_len=PROMPT_LEN, ends=(END,))
    drawn = []
    for number in range(DRAWS // slots):
        # The history stays; only the number that keys the draw goes on, below min_new_tokens for the ban's sake.
        columns = np.arange(slots), np.full(slots, len(HISTORY)), np.full(slots, number)
        rows = SampledRows(*columns, *(torch.from_numpy(column).to(place) for column in columns))
        x_QV = logits().to(place).expand(slots, VOCAB).contiguous()
        drawn.append(sampler.sample(x_QV, rows, table.token_ids_SL).tokens_Q.cpu().numpy())
        np.testing.assert_allclose(x_QV[number].double().cpu().numpy(), expected, atol=2e-6)
    assert chi_square(np.concatenate(drawn), kept(expected, ALL)) < 1


def fields_of(one: Any) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([HISTORY]), logits()[None])[0]
    config = GenerationConfig(repetition_penalty=penalty)
    ours = edited(logits().double().numpy(), config, history=HISTORY, prompt_len=PROMPT_LEN)
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=1e-6)


def test_bad_words_never_appear(pipe: AsyncEngine) -> None:
    free = GenerationConfig(max_new_tokens=40, ignore_eos=True, top_k=0, temperature=1.0, random_seed=3)
    texts = [response.text for response in pipe([f"prompt {number}" for number in range(20)], free)]
    words = [word for word in (" the", "e", "10") if any(word in text for text in texts)]
    assert words
    tamed = GenerationConfig(**{**free.to_dict(), "bad_words": words})
    banned = {form for word in words for form in forms(pipe, word)}
    for response in pipe([f"prompt {number}" for number in range(20)], tamed):
        for form in banned:
            spans = zip(*(response.token_ids[start:] for start in range(len(form))), strict=False)
            assert form not in set(spans), response.text


def forms(pipe: AsyncEngine, word: str) -> list[tuple[int, ...]]:
    return [pipe.frontend.tokenizer.encode_chat(word), pipe.frontend.tokenizer.encode_chat(" " + word)]
