"""The sampler through real plans on a tiny model: every field of GenerationConfig, against an independent computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plan_driver import generate, options_for, request

from engine.executor import LocalExecutor
from engine.plan import Admission, PlanRow, StepPlan
from engine.sampler import Sampler
from engine.state_table import SampledRows, StateTable

VOCAB = 50
HISTORY = [3, 3, 7, 9, 3, 12]  # 4 prompt tokens, then 2 of output
PROMPT_LEN = 4


@pytest.fixture(scope="module")
def executor(tiny_model_dir: Path) -> LocalExecutor:
    return LocalExecutor(options_for(tiny_model_dir))


def edited_logits(logits: torch.Tensor, **fields: Any) -> torch.Tensor:
    """Run one row with HISTORY through the sampler and return what it made of its logits; slot 1 holds another request."""
    device = torch.device("cpu")
    table = StateTable(num_slots=2, session_len=32, block_size=16, device=device)
    sampler = Sampler(num_slots=2, vocab_size=VOCAB, device=device)
    one = request(HISTORY[:PROMPT_LEN], **fields)
    mate = request([1, 2])
    admitted = (Admission(0, one, tuple(HISTORY), (0,)), Admission(1, mate, (1, 2), (1,)))
    table.admit(admitted)
    sampler.admit(admitted)
    slots, lengths, output_indices = np.array([(1, 2, 0), (0, len(HISTORY), len(HISTORY) - PROMPT_LEN)]).T.copy()
    columns = map(torch.from_numpy, (slots, lengths, output_indices))
    both = torch.stack([logits.clone(), logits.clone()])
    sampler.sample(both, SampledRows(slots, lengths, output_indices, *columns), table.token_ids_SL)
    assert torch.equal(both[0], logits), "a row that asks for nothing was changed"
    return both[1]


def test_penalties_and_bias_in_the_documented_order() -> None:
    torch.manual_seed(0)
    logits = torch.randn(VOCAB)
    got = edited_logits(
        logits, repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={3: 1.5, 20: -2.0, 4000: 3.0}
    )
    expected = logits.clone()
    expected[3] += 1.5
    expected[20] -= 2.0
    for token in set(HISTORY):
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token in HISTORY[PROMPT_LEN:]:
        expected[token] -= 0.2 + 0.3
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def banned(**fields: Any) -> set[int]:
    return set((edited_logits(torch.zeros(VOCAB), **fields) == -math.inf).nonzero().flatten().tolist())


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_lower_the_temperature_the_nearer_to_greedy(executor: LocalExecutor, temperature: float) -> None:
    prompt = [9, 8, 7, 6]
    cold = [request(prompt, top_k=0, temperature=temperature, seed=seed) for seed in range(4)]
    (greedy, *others), _ = generate(executor, [request(prompt), *cold], steps=6, block_size=64)
    assert all(one == greedy for one in others)


def test_bans() -> None:
    assert banned(bad_sequences=((5,), (6,), (4000,))) == {5, 6}
    # The history ends in 9, 3, 12.
    assert banned(bad_sequences=((3, 12, 8), (12, 9), (7, 12, 1), (9, 3, 12, 2), (3, 3, 3, 3, 3, 3, 3, 3, 3))) == {8, 9, 2}
    assert banned(bad_sequences=((12, 8), (13, 8))) == {8}
    assert banned(ignore_eos=True, eos_ids=(2,), stop_ids=(30,)) == {2, 30}
    assert banned(eos_ids=(2,), stop_ids=(30,)) == set()
    assert banned(min_new_tokens=3, eos_ids=(2,), stop_ids=(30,)) == {2, 30}  # two tokens are there
    assert banned(min_new_tokens=2, eos_ids=(2,), stop_ids=(30,)) == set()


def test_bad_token_changes_the_greedy_text_and_nothing_else(executor: LocalExecutor) -> None:
    prompt = [5, 6, 7]
    (free,), _ = generate(executor, [request(prompt)], steps=8, block_size=64)
    (kept, other), _ = generate(
        executor, [request(prompt, bad_sequences=((free[0], free[1]),)), request(prompt)], steps=8, block_size=64
    )
    assert other == free
    assert kept[0] == free[0]
    assert kept[1] != free[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_seeded_row_is_independent_of_its_mates(executor: LocalExecutor, overlap: bool) -> None:
    def seeded(seed: int = 2**64 - 3, choice: int = 0) -> Any:
        return request([9, 8, 7, 6], top_k=0, temperature=1.5, seed=seed, choice=choice, top_p=0.9)

    (alone,), _ = generate(executor, [seeded()], steps=10, block_size=64, overlap=overlap)
    mates = [request([1] * 40), request([4, 5], top_k=5, temperature=2.0, seed=1), seeded(), seeded(choice=1), seeded(seed=4)]
    mixed, _ = generate(executor, mates, steps=10, block_size=64, overlap=overlap, chunk=16)
    assert mixed[2] == alone
    assert mixed[3] != alone
    assert mixed[4] != alone


def test_after_a_preemption_sampling_goes_on_identically(executor: LocalExecutor) -> None:
    one = request([9, 8, 7, 6], top_k=0, temperature=1.5, seed=11, repetition_penalty=1.3)
    (whole,), _ = generate(executor, [one], steps=10, block_size=64)
    known = (*one.prompt_ids, *whole[:6])
    plan = StepPlan(step=0, admitted=(Admission(3, one, known, (7,)),), rows=(PlanRow(3, 0, len(known), True, 6, ()),))
    again = [executor.launch(plan).result().tokens[0]]
    for index in range(7, 10):
        step = StepPlan(step=index, admitted=(), rows=(PlanRow(3, 3 + index, 1, True, index, ()),))
        again += executor.launch(step).result().tokens
    assert again == whole[6:]


def test_draws_follow_the_distribution(executor: LocalExecutor) -> None:
    """Top-k 3 at temperature 1: only the three best tokens come, about as often as their probabilities say."""
    prompt = [9, 8, 7, 6]
    (_, (first, *_)) = generate(executor, [request(prompt, logprobs=3)], steps=1, block_size=64)
    logprobs = first.logprobs[0]
    assert logprobs is not None
    weights = {token: math.exp(value) for token, value in logprobs.top}
    total = sum(weights.values())
    counts = dict.fromkeys(weights, 0)
    rounds = 60
    for seed in range(rounds):
        group = [request(prompt, top_k=3, temperature=1.0, seed=1000 + seed, choice=choice) for choice in range(8)]
        tokens, _ = generate(executor, group, steps=1, block_size=64)
        for (token,) in tokens:
            counts[token] += 1  # KeyError: a token that top-k should have dropped
    draws = rounds * 8
    for token, count in counts.items():
        p = weights[token] / total
        assert abs(count - draws * p) < 5 * math.sqrt(draws * p * (1 - p)) + 1


def test_logprobs_are_raw_and_each_row_gets_what_it_asked_for(executor: LocalExecutor, tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = [9, 8, 7, 6]
    rows = [
        request(prompt, logprobs=4, repetition_penalty=1.9, logit_bias={17: 50.0}),
        request(prompt),
        request([5, 5], logprobs=0),
        request(prompt, logprobs=1, top_k=0, temperature=2.0, seed=3),
    ]
    (tokens, (output,)) = generate(executor, rows, steps=1, block_size=64)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32)
    with torch.inference_mode():
        truth = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    first, none, bare, last = output.logprobs
    assert none is None
    assert first is not None
    assert bare is not None
    assert last is not None
    assert (first.token_id, tokens[0][0]) == (17, 17)
    assert first.logprob == pytest.approx(float(truth[17]), abs=1e-4)
    best = truth.topk(4)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert bare.top == ()
    assert len(last.top) == 1
    assert last.logprob == pytest.approx(float(truth[last.token_id]), abs=1e-4)


def test_a_row_of_nan_logits_is_reported_and_its_mates_are_not(tiny_model_dir: Path) -> None:
    executor = LocalExecutor(options_for(tiny_model_dir))
    poisoned, good = request([300, 6, 7], top_k=0, temperature=1.0), request([4, 6, 7])
    (expected,), _ = generate(executor, [good], steps=3, block_size=64)
    rank = executor._rank
    assert rank is not None
    embedding = rank.runner._forward.__self__.embedding.weight_VD
    before = embedding[300].clone()
    with torch.inference_mode():
        embedding[300] = math.nan
    tokens, outputs = generate(executor, [poisoned, good], steps=3, block_size=64)
    assert [output.invalid for output in outputs] == [frozenset({0})] * 3
    assert tokens[1] == expected
    with torch.inference_mode():
        embedding[300] = before
    # The poisoned blocks are handed out again: nothing of them may reach the next request.
    (again,), outputs = generate(executor, [good], steps=3, block_size=64)
    assert again == expected
    assert not any(output.invalid for output in outputs)


def test_all_tokens_banned_is_invalid_not_a_crash(executor: LocalExecutor) -> None:
    everything = tuple((token,) for token in range(1000))
    _, outputs = generate(executor, [request([5], bad_sequences=everything), request([5])], steps=2, block_size=64)
    assert [output.invalid for output in outputs] == [frozenset({0})] * 2
