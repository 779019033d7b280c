"""`pipeline()` on a real engine process with a tiny model: shapes, defaults, isolation, streams, restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipelines import SMALL as CONFIG
from pipelines import assert_idle

from engine.async_engine import LEGACY_DEFAULTS, AsyncEngine
from headrace import (
    EngineError,
    GenerationConfig,
    InvalidRequest,
    ModelLoadError,
    PytorchEngineConfig,
    Response,
    TurbomindEngineConfig,
    UnsupportedOption,
    pipeline,
)
from headrace.errors import KVCapacity

GREEDY = GenerationConfig(max_new_tokens=12)
RANDOM = GenerationConfig(max_new_tokens=12, top_k=0, temperature=1.0)
USER = [{"role": "user", "content": "turn the wheel"}]


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> Iterator[AsyncEngine]:
    with pipeline(str(tiny_model_dir), backend_config=CONFIG) as made:
        yield made


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> Any:
    """Greedy continuation by transformers: prompt ids and a length to new ids."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32)

    def generate(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=length, do_sample=False
            )
        new = out[0, len(ids) :].tolist()
        return tuple(new[: new.index(2)] if 2 in new else new)

    return generate


def test_shapes(pipe: AsyncEngine) -> None:
    one = pipe("turn the wheel", GREEDY)
    assert isinstance(one, Response)
    assert pipe(["turn the wheel"], GREEDY) == [one]
    conversation = pipe(USER, GREEDY)
    assert isinstance(conversation, Response)
    assert (conversation.text, conversation.input_token_len) == (one.text, one.input_token_len)
    assert [response.text for response in pipe([USER, USER], GREEDY)] == [one.text] * 2
    assert pipe([], GREEDY) == []
    assert [response.text for response in pipe(["turn the wheel", USER], GREEDY)] == [one.text] * 2
    for wrong in (None, 5, b"bytes", {"role": "user", "content": "x"}):
        with pytest.raises(InvalidRequest):
            pipe(wrong, GREEDY)


def test_greedy_text_is_that_of_transformers(pipe: AsyncEngine, reference: Any) -> None:
    prompts = ["turn the wheel", "water", "the mill " * 40, "水車 🙂", "a"]
    template = pipe.frontend._template
    responses = pipe(prompts, GenerationConfig(max_new_tokens=24))
    for prompt, response in zip(prompts, responses, strict=True):
        ids = template.encode(prompt)
        assert response.token_ids == reference(ids, 24)
        assert response.text == pipe.frontend.tokenizer.decode(response.token_ids)
        assert response.input_token_len == len(ids)
        assert response.generate_token_len == len(response.token_ids)


def test_do_preprocess_false_continues_the_bare_text(pipe: AsyncEngine, reference: Any) -> None:
    response = pipe("the water runs", GREEDY, False)
    ids = pipe.frontend.tokenizer.encode_raw("the water runs")
    assert response.token_ids == reference(ids, 12)
    assert pipe([USER], GREEDY, do_preprocess=False)[0].error_code == "invalid_request"


def test_bad_prompts_are_errors_in_their_own_place(pipe: AsyncEngine) -> None:
    good = pipe("water", GREEDY).text
    bad: list[Any] = ["", "long " * 2000, [{"role": "evil", "content": "x"}], [{"role": "user"}], 7, None, "\ud800"]
    responses = pipe([*bad, "water"] * 3, GREEDY)
    codes = ["invalid_request", "context_length_exceeded", *["invalid_request"] * 5]
    for start in range(0, len(responses), len(bad) + 1):
        part = responses[start : start + len(bad) + 1]
        assert [response.error_code for response in part[:-1]] == codes
        assert all(
            response.finish_reason == "error" and response.text == "" and response.error_message for response in part[:-1]
        )
        assert (part[-1].text, part[-1].error_code) == (good, None)
    assert [response.index for response in responses] == list(range(len(responses)))


def test_length_limits(pipe: AsyncEngine) -> None:
    exact = pipe("water", GenerationConfig(max_new_tokens=9, ignore_eos=True))
    assert (len(exact.token_ids), exact.finish_reason, exact.stop_detail) == (9, "length", "max_new_tokens")
    open_end = pipe("water", GenerationConfig(max_new_tokens=None, ignore_eos=True))
    assert open_end.input_token_len + len(open_end.token_ids) == 1024
    assert (open_end.finish_reason, open_end.stop_detail) == ("length", "session_len")


def test_a_pool_that_ends_answers_says_so(tiny_model_dir: Path) -> None:
    with pipeline(str(tiny_model_dir), backend_config=replace(CONFIG, num_gpu_blocks=2)) as small:
        answer = small("water", GenerationConfig(max_new_tokens=200, ignore_eos=True))
    assert answer.input_token_len + len(answer.token_ids) == 33  # type: ignore[union-attr]  # one prompt, one answer
    assert (answer.finish_reason, answer.stop_detail) == ("length", "kv_pool")  # type: ignore[union-attr]  # the same


def test_stop_words_cut_the_text_across_tokens(pipe: AsyncEngine) -> None:
    whole = pipe("water", GenerationConfig(max_new_tokens=40, ignore_eos=True))
    start = next(
        i for i in range(4, 30) if "\ufffd" not in whole.text[i : i + 4] and whole.text.find(whole.text[i : i + 4]) == i
    )
    word = whole.text[start : start + 4]
    for include in (False, True):
        config = GenerationConfig(max_new_tokens=40, ignore_eos=True, stop_words=[word], include_stop_str_in_output=include)
        cut = pipe("water", config)
        assert cut.text == whole.text[:start] + (word if include else "")
        assert (cut.finish_reason, cut.stop_detail) == ("stop", f"stop_word:{word}")
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        pieces = list(pipe.stream_infer("water", config))
        assert "".join(piece.text for piece in pieces) == cut.text
    never = pipe("water", GenerationConfig(max_new_tokens=40, ignore_eos=True, stop_words=["never this"]))
    assert never.text == whole.text


def test_stop_token_that_a_stop_word_names(pipe: AsyncEngine) -> None:
    whole = pipe("water", GenerationConfig(max_new_tokens=40, ignore_eos=True, logit_bias={0: 8}, skip_special_tokens=False))
    assert 0 in whole.token_ids  # <|endoftext|>, which is not this model's end-of-sequence token
    cut = pipe(
        "water",
        GenerationConfig(
            max_new_tokens=40, ignore_eos=False, bad_token_ids=[2], logit_bias={0: 8}, stop_words=["<|endoftext|>"]
        ),
    )
    assert (cut.finish_reason, cut.stop_detail) == ("stop", "stop_word:<|endoftext|>")
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(0)]


def test_bad_words_never_appear(pipe: AsyncEngine) -> None:
    free = pipe(["water"] * 1, GenerationConfig(max_new_tokens=60, ignore_eos=True, repetition_penalty=1.2))[0]
    word = pipe.frontend.tokenizer.decode([next(t for t in free.token_ids if pipe.frontend.tokenizer.decode([t]).isalnum())])
    tamed = pipe("water", GenerationConfig(max_new_tokens=60, ignore_eos=True, repetition_penalty=1.2, bad_words=[word]))
    banned = set(pipe.frontend.tokenizer.encode_chat(word))
    assert banned & set(free.token_ids)
    assert not banned & set(tamed.token_ids)


def test_choices(pipe: AsyncEngine) -> None:
    config = GenerationConfig(n=3, max_new_tokens=8, top_k=0, random_seed=7)
    response = pipe("water", config)
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert len({choice.text for choice in response.choices}) == 3
    assert response.text == response.choices[0].text
    assert pipe("water", GenerationConfig(max_new_tokens=8, top_k=0, random_seed=7)).text == response.text
    pieces = list(pipe.stream_infer("water", config))
    for choice in response.choices:
        assert "".join(piece.text for piece in pieces if piece.choice == choice.index) == choice.text


def test_seed_gives_the_same_text_in_any_company(pipe: AsyncEngine) -> None:
    config = GenerationConfig(max_new_tokens=16, top_k=0, random_seed=2**63 + 5)
    alone = pipe("water", config).text
    crowd = pipe(["mill", "wheel " * 30, "water", *["x"] * 20, "water"], config)
    assert crowd[2].text == crowd[-1].text == alone
    assert pipe("water", GenerationConfig(max_new_tokens=16, top_k=0, random_seed=6)).text != alone
    unseeded = {response.text for response in pipe(["water"] * 8, RANDOM)}
    assert len(unseeded) > 1  # independent draws, unlike one seed for the whole call


def test_legacy_arguments(pipe: AsyncEngine) -> None:
    assert LEGACY_DEFAULTS == {
        "request_output_len": 512,
        "top_k": 40,
        "top_p": 0.8,
        "temperature": 0.8,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
    }
    with (
        pytest.warns(DeprecationWarning, match="request_output_len is deprecated"),
        pytest.warns(DeprecationWarning, match="ignore_eos"),
    ):
        assert len(pipe("water", request_output_len=5, ignore_eos=True).token_ids) == 5  # type: ignore[union-attr]
    with (
        pytest.warns(DeprecationWarning, match="request_output_len"),
        pytest.raises(InvalidRequest, match="must be") as refused,
    ):
        pipe("water", request_output_len=0)
    assert refused.value.param == "request_output_len"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loud = pipe("water", GREEDY, top_k=3, temperature=1.0)
    assert [w.category for w in caught] == [DeprecationWarning, DeprecationWarning, UserWarning]
    assert "so top_k, temperature is ignored" in str(caught[-1].message)
    assert {w.filename for w in caught} == {__file__}  # a warning names the caller's line, not ours
    assert loud == pipe("water", GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = {response.text for response in pipe(["water"] * 6)}
    assert len(texts) > 1  # the bare call samples
    assert pipe.batch_infer("water").text == pipe("water", GenerationConfig()).text  # batch_infer is greedy


def test_one_config_for_each_prompt(pipe: AsyncEngine) -> None:
    configs = [GenerationConfig(max_new_tokens=count, ignore_eos=True) for count in (3, 1, 5)]
    assert [len(response.token_ids) for response in pipe(["a", "b", "c"], configs)] == [3, 1, 5]
    with pytest.raises(InvalidRequest, match="3 gen_configs for 2 prompts"):
        pipe(["a", "b"], configs)
    with pytest.raises(InvalidRequest, match="gen_config"):
        pipe(["a"], {"top_k": 3})  # type: ignore[arg-type]


def test_iterator_is_drawn_as_needed_and_answered_whole(pipe: AsyncEngine) -> None:
    drawn = 0

    def prompts() -> Iterator[str]:
        nonlocal drawn
        for number in range(300):
            drawn += 1
            yield f"prompt {number}"

    answers = pipe(prompts(), GenerationConfig(max_new_tokens=2))
    assert drawn == 0
    first = next(answers)  # type: ignore[arg-type]
    assert drawn <= 2 * pipe.frontend.window
    indices = [first.index, *(response.index for response in answers)]  # type: ignore[union-attr]
    assert sorted(indices) == list(range(300))


def test_dropped_iterator_aborts_what_it_submitted(pipe: AsyncEngine) -> None:
    answers = pipe.stream((f"prompt {number}" for number in range(10**9)), GenerationConfig(max_new_tokens=4))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert_idle(pipe)


def test_streams_are_interleaved_and_add_up(pipe: AsyncEngine) -> None:
    prompts: list[Any] = ["water", "the mill", "", USER]
    pieces = list(pipe.stream_infer(prompts, GREEDY))
    whole = pipe(prompts, GREEDY)
    for response in whole:
        own = [piece for piece in pieces if piece.index == response.index]
        assert "".join(piece.text for piece in own) == response.text
        assert tuple(token for piece in own for token in piece.token_ids) == response.token_ids
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [response.finish_reason]
        assert own[-1].generate_token_len == response.generate_token_len
    order = [piece.index for piece in pieces]
    assert order != sorted(order)


def test_logprobs(pipe: AsyncEngine) -> None:
    response = pipe("water", GenerationConfig(max_new_tokens=5, logprobs=3))
    assert response.logprobs is not None
    assert [row.token_id for row in response.logprobs] == list(response.token_ids)
    assert all(len(row.top) == 3 and row.top[0] == (row.token_id, row.logprob) and row.logprob < 0 for row in response.logprobs)


def test_inside_a_running_event_loop(pipe: AsyncEngine) -> None:
    async def main() -> None:
        expected = pipe("water", GREEDY)
        pieces = [piece async for piece in pipe.generate("water", GREEDY)]
        assert "".join(piece.text for piece in pieces) == expected.text
        both = await asyncio.gather(pipe.async_batch_infer(["water"], GREEDY), pipe.async_batch_infer(["mill"], GREEDY))
        assert both[0][0].text == expected.text
        errors = [piece async for piece in pipe.generate("", GREEDY)]
        assert [piece.error_code for piece in errors] == ["invalid_request"]
        async for _ in pipe.generate("water", GenerationConfig(max_new_tokens=500, ignore_eos=True)):
            break

    asyncio.run(main())


def test_eight_threads(pipe: AsyncEngine) -> None:
    prompts = [f"thread {number}" for number in range(8)]
    expected = [response.text for response in pipe(prompts, GREEDY)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda own: [response.text for response in pipe([own] * 10, GREEDY)], prompts))
    assert results == [[text] * 10 for text in expected]


def test_report_says_what_runs(pipe: AsyncEngine) -> None:
    report = pipe.report()
    assert report["engine"]["num_blocks"] == 256
    assert report["template"] == "the tokenizer's own template"
    assert report["stats"]["is_alive"]
    assert report["stats"]["prompts_completed"] > 0


def test_idle_engine_sleeps_and_ctrl_c_is_not_its_business(pipe: AsyncEngine) -> None:
    (pid,) = pipe.frontend.pids
    os.kill(pid, signal.SIGINT)
    process = psutil.Process(pid)
    before = process.cpu_times()
    time.sleep(0.7)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) < 0.1
    assert pipe("water", GREEDY).error_code is None
    assert pipe.frontend.pids == (pid,)


def test_killed_engine_in_the_middle_of_a_batch(pipe: AsyncEngine) -> None:
    prompts = [f"prompt {number}" for number in range(60)]
    config = GenerationConfig(max_new_tokens=30, ignore_eos=True, top_k=0, random_seed=11)
    expected = [response.text for response in pipe(prompts, config)]
    (pid,) = pipe.frontend.pids
    got: list[Response] = []
    thread = threading.Thread(target=lambda: got.extend(pipe(prompts, config)))  # type: ignore[arg-type]
    streamed: list[Response] = []
    reader = threading.Thread(target=lambda: streamed.extend(pipe.stream_infer(prompts[:3], config)))
    thread.start()
    reader.start()
    deadline = time.monotonic() + 10
    while not streamed and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    thread.join(60)
    reader.join(60)
    assert [response.text for response in got] == expected
    for index in range(3):
        assert "".join(piece.text for piece in streamed if piece.index == index) == expected[index]
    assert pipe.frontend.pids != (pid,)
    assert pipe.report()["stats"]["engine_deaths"] == 1


def test_two_pipelines_and_reopening(pipe: AsyncEngine, tiny_model_dir: Path) -> None:
    expected = pipe("water", GREEDY).text
    other = pipeline(str(tiny_model_dir), backend_config=TurbomindEngineConfig(cache_max_entry_count=64))
    try:
        assert not set(other.frontend.pids) & set(pipe.frontend.pids)
        assert other("water", GREEDY).text == pipe("water", GREEDY).text == expected  # type: ignore[union-attr]
    finally:
        pids = other.frontend.pids
        other.close()
        other.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(EngineError, match="closed"):
        other("water")
    assert pipe("water", GREEDY).text == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_takes_its_group_down_and_the_work_goes_on(pair: AsyncEngine, rank: int) -> None:
    config = GenerationConfig(max_new_tokens=60, ignore_eos=True, random_seed=11, top_k=0)
    prompts = [f"prompt {number}" for number in range(12)]
    expected = [response.text for response in pair(prompts, config)]  # type: ignore[union-attr]
    pids = pair.frontend.pids
    assert len(pids) == 2
    pieces = pair.stream_infer(prompts, config)
    first = next(pieces)
    os.kill(pids[rank], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    texts = dict.fromkeys(range(12), "")
    for piece in (first, *pieces):
        texts[piece.index] += piece.text
        assert piece.error_code is None
    assert list(texts.values()) == expected


@pytest.fixture(scope="module")
def pair(tiny_model_dir: Path) -> Iterator[AsyncEngine]:
    with pipeline(str(tiny_model_dir), backend_config=TurbomindEngineConfig(tp=2, cache_max_entry_count=64)) as made:
        yield made


def test_two_ranks_give_the_text_of_one(pipe: AsyncEngine, pair: AsyncEngine) -> None:
    assert [r.text for r in pair(["water", USER], GREEDY)] == [r.text for r in pipe(["water", USER], GREEDY)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_path": "/no/such/model"}, ModelLoadError, "/no/such/model"),
        ({"model_path": None}, InvalidRequest, "model_path is a directory or a hub id, not NoneType"),
        ({"backend_config": PytorchEngineConfig(block_size=1 << 30, device="cpu")}, KVCapacity, "a smaller block_size"),
        ({"model_path": "nobody/no-such-model"}, ModelLoadError, "no-such-model"),
        ({"model_name": "no-such-template"}, InvalidRequest, "no-such-template"),
        (
            {"model_name": "yi", "backend_config": PytorchEngineConfig(model_name="solar", device="cpu")},
            InvalidRequest,
            "different",
        ),
        ({"backend_config": PytorchEngineConfig(session_len=10**6, device="cpu")}, InvalidRequest, "session_len"),
        ({"backend_config": PytorchEngineConfig(eviction_type="copy")}, UnsupportedOption, "eviction_type"),
        ({"backend_config": PytorchEngineConfig(tp=3, device="cpu")}, InvalidRequest, "tp"),
        ({"log_level": "LOUD"}, InvalidRequest, "log_level"),
    ],
)
def test_errors_at_construction(tiny_model_dir: Path, change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"model_path": str(tiny_model_dir), "backend_config": CONFIG, **change}
    with pytest.raises(error, match=words):
        pipeline(**arguments)


def test_weights_that_are_broken_raise_model_load_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.suffix != ".safetensors" else b"not weights")
    with pytest.raises(ModelLoadError):
        pipeline(str(tmp_path), backend_config=CONFIG)
