"""`get_ppl` against torch's cross-entropy; prompt log-probabilities through `pipeline()`; a job's seeds; why it ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from headrace import ContextLengthExceeded, GenerationConfig, InvalidRequest, PytorchEngineConfig, pipeline

SEQUENCES = [[5 + (i * 37 + n * 11) % 300 for i in range(length)] for n, length in enumerate((2, 3, 17, 64, 90, 200))]
CONFIGS = {
    "in chunks, no cache": PytorchEngineConfig(
        device="cpu", num_gpu_blocks=32, block_size=16, max_batch_size=4, max_prefill_token_num=9, enable_prefix_caching=False
    ),
    "roomy": PytorchEngineConfig(device="cpu", num_gpu_blocks=128, block_size=16, max_batch_size=4, session_len=300),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pipe(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Iterator[AsyncEngine]:
    with pipeline(str(tiny_model_dir), backend_config=CONFIGS[request.param]) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32)
    means = []
    with torch.no_grad():
        for ids in SEQUENCES:
            logits = model(torch.tensor([ids])).logits[0]
            means.append(float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))))
    return means


def test_it_is_torchs_mean_cross_entropy_also_the_second_time(pipe: AsyncEngine, expected: list[float]) -> None:
    import torch

    assert pipe.get_ppl(SEQUENCES) == pytest.approx(expected, abs=1e-4)
    # The second time every full block is in the cache; the answer must not come from there.
    assert pipe.get_ppl(SEQUENCES * 3) == pytest.approx(expected * 3, abs=1e-4)
    assert pipe.get_ppl(SEQUENCES[3]) == pytest.approx(expected[3:4], abs=1e-4)
    assert pipe.get_ppl(torch.tensor(SEQUENCES[3])) == pytest.approx(expected[3:4], abs=1e-4)
    assert pipe.get_ppl([]) == []


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([5], r"input_ids\[0\] has 1 tokens"),
        ([[5, 6], []], r"input_ids\[1\] has 0 tokens"),
        ([[5, 6], [7, "x"]], r"input_ids\[1\] is not a list of token ids"),
        ([[5, True]], r"input_ids\[0\] is not"),
        ("text", "a list of token ids"),
        ([[5, 6], [5, 10**6]], "vocabulary has"),
        ([[5, -3]], "vocabulary has"),
    ],
)
def test_what_is_no_sequence_is_refused(pipe: AsyncEngine, ids: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        pipe.get_ppl(ids)


def test_a_refused_sequence_is_named_by_its_index(pipe: AsyncEngine) -> None:
    with pytest.raises(InvalidRequest) as refused:
        pipe.get_ppl([[5, 6], [5, 10**6]])
    assert (refused.value.param, refused.value.index) == ("input_ids", 1)


def test_a_sequence_longer_than_the_session_is_refused_and_nothing_stays_behind(pipe: AsyncEngine) -> None:
    with pytest.raises(ContextLengthExceeded, match="sequence 1"):
        pipe.get_ppl([SEQUENCES[4], [7] * 2000, SEQUENCES[5]])
    assert len(pipe.get_ppl(SEQUENCES)) == len(SEQUENCES)
    assert pipe.report()["stats"]["blocks_used"] == 0


def test_a_sequence_may_fill_the_session(tiny_model_dir: Path, expected: list[float]) -> None:
    longest = len(SEQUENCES[-1])
    config = PytorchEngineConfig(device="cpu", num_gpu_blocks=32, block_size=16, max_batch_size=2, session_len=longest)
    with pipeline(str(tiny_model_dir), backend_config=config) as pipe:
        assert pipe.get_ppl(SEQUENCES[-2:]) == pytest.approx(expected[-2:], abs=1e-4)
        with pytest.raises(ContextLengthExceeded, match="sequence 0"):
            pipe.get_ppl([[*SEQUENCES[-1], 9]])


def test_prompt_logprobs_come_with_the_answer_and_with_a_streams_first_piece(pipe: AsyncEngine) -> None:
    config = GenerationConfig(
        max_new_tokens=5, prompt_logprobs=2, n=3, top_k=0, temperature=1.0, random_seed=4, ignore_eos=True
    )
    response: Any = pipe("turn the wheel", config)
    rows = response.prompt_logprobs
    assert len(rows) == response.input_token_len - 1
    assert all(len(row.top) == 2 for row in rows)
    assert all(row.logprob <= row.top[0][1] and math.isfinite(row.logprob) for row in rows)
    pieces = list(pipe.stream_infer("turn the wheel", config))
    told = [piece for piece in pieces if piece.prompt_logprobs is not None]
    assert [(piece.choice, piece.prompt_logprobs[0].token_id) for piece in told] == [(0, rows[0].token_id)]
    assert pieces.index(told[0]) == [piece.choice for piece in pieces].index(0)
    # A stop word ends the answer from outside the engine; what was asked of the prompt comes all the same.
    stopped: Any = pipe("turn the wheel", GenerationConfig(max_new_tokens=5, prompt_logprobs=0, stop_words=response.text[:1]))
    assert len(stopped.prompt_logprobs) == len(rows)
    plain: Any = pipe("turn the wheel", GenerationConfig(max_new_tokens=2))
    assert plain.prompt_logprobs is None


def test_what_completes_with_the_last_allowed_token_is_a_stop(pipe: AsyncEngine) -> None:
    config: Any = {"top_k": 0, "temperature": 1.0, "random_seed": 12, "ignore_eos": True}
    whole: Any = pipe("turn the wheel", GenerationConfig(max_new_tokens=8, **config))
    word = next(letter for letter in reversed(whole.text) if letter != "\ufffd")
    ends = []
    for most in range(1, 9):
        answer: Any = pipe("turn the wheel", GenerationConfig(max_new_tokens=most, stop_words=[word], **config))
        ends.append((answer.finish_reason, answer.stop_detail))
        if answer.finish_reason == "stop":
            assert answer.text == whole.text[: whole.text.index(word)]
    # From the limit on at which the word's last token is the last one allowed.
    at = ends.index(("stop", f"stop_word:{word}"))
    assert ends == [("length", "max_new_tokens")] * at + [("stop", f"stop_word:{word}")] * (8 - at)


def test_the_choices_are_counted_as_one_prompt(pipe: AsyncEngine) -> None:
    before = pipe.report()["stats"]
    config = GenerationConfig(n=4, max_new_tokens=6, top_k=0, temperature=1.0, random_seed=3, ignore_eos=True)
    response: Any = pipe("the headrace " * 20 + "turns", config)
    after = pipe.report()["stats"]
    assert len({choice.token_ids for choice in response.choices}) == 4
    assert after["prompt_tokens"] - before["prompt_tokens"] == response.input_token_len
    assert response.cached_tokens == 0
    computed = after["computed_tokens"] - before["computed_tokens"]
    assert computed == response.input_token_len + 3 + 4 * 5
