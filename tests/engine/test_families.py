"""Several choices of one prompt: computed once, shared by reference, forked by copy, and the same answers as apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_driver import make_engine
from engine_driver import run as run_model
from engine_on_fake import VOCAB, check, drain, run
from fake_device import NAN_TOKEN, FakeDevice, FakeOptions, continue_alone, request

from engine.engine import Engine
from engine.request import TokenRequest
from headrace.config import GenerationConfig

NEVER = (10**6,)


def family(name: str, prompt, count: int, **fields):
    return [request(f"{name}-{choice}", prompt, family=name, choice=choice, **fields) for choice in range(count)]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 31, 32, 50])
def test_the_prompt_is_computed_once_and_its_last_token_once_a_choice(length, caching):
    requests = family("f", [3 + i % 9 for i in range(length)], 4, max_new_tokens=6, eos_ids=NEVER)
    tokens, last, device, engine = run(requests, enable_prefix_caching=caching)
    check(requests, tokens, last)
    assert len(set(tokens.values())) == 4, "the choices are one text"
    stats = engine.stats()
    assert stats.computed_tokens == length + 3 + 4 * 5
    assert (stats.prompt_tokens, stats.cached_tokens) == (length, 0)
    # One block a fork, and none where the prompt's last token stands alone in its block.
    assert sum(len(plan.copies) for plan in device.plans) == (0 if (length - 1) % 16 == 0 else 3)
    # All forks run from the step after the prompt's last chunk on.
    assert len(device.plans[1].rows) == 4


@pytest.mark.parametrize("caching", [True, False])
def test_four_choices_of_a_long_prompt_take_less_than_half_more_kv_than_one(caching):
    most = {}
    for count in (1, 4):
        opts = FakeOptions(enable_prefix_caching=caching, session_len=1000, max_prefill_token_num=512)
        engine = Engine(FakeDevice(200, opts, vocab=VOCAB), opts)
        for one in family("f", [3 + i % 30 for i in range(600)], count, max_new_tokens=40, eos_ids=NEVER):
            engine.add(one)
        most[count] = 0
        while engine.has_work:
            engine.step()
            most[count] = max(most[count], engine.stats().blocks_used)
    assert most[4] < 1.5 * most[1]


def test_forks_start_after_the_leader_has_ended():
    """A prompt that is scored four times with one token each is still one prompt."""
    requests = family("f", range(3, 43), 4, max_new_tokens=1, eos_ids=NEVER)
    tokens, last, _, engine = run(requests, enable_prefix_caching=False)
    check(requests, tokens, last)
    assert engine.stats().computed_tokens == 40 + 3


def test_forks_wait_for_slots_without_losing_the_prompt():
    requests = family("f", range(3, 43), 7, max_new_tokens=9, eos_ids=NEVER)
    tokens, last, _, engine = run(requests, enable_prefix_caching=False, max_batch_size=2)
    check(requests, tokens, last)
    assert engine.stats().computed_tokens == 40 + 6 + 7 * 8


def test_a_pool_with_room_for_the_prompt_alone_gives_the_shared_blocks_up():
    requests = family("f", range(3, 35), 3, max_new_tokens=20, eos_ids=NEVER)
    for num_blocks in (2, 3, 4, 5):
        tokens, last, _, _ = run(requests, num_blocks=num_blocks)
        check(requests, tokens, last, num_blocks=num_blocks)


def test_forks_are_not_held_back_by_the_prefill_interval():
    opts = FakeOptions(max_batch_size=10, prefill_interval=1000)
    device = FakeDevice(100, opts, vocab=VOCAB)
    engine = Engine(device, opts)
    for index in range(4):
        engine.add(request(f"r{index}", [3 + index], max_new_tokens=60, eos_ids=NEVER))
    engine.step()
    for one in family("f", range(3, 23), 4, max_new_tokens=5, eos_ids=NEVER):
        engine.add(one)
    engine.step()
    engine.step()
    assert [len(plan.rows) for plan in device.plans] == [4, 5, 8]


def test_an_aborted_leader_leaves_the_prompt_to_the_next_and_aborted_forks_leave_no_blocks():
    opts = FakeOptions(max_prefill_token_num=16)
    engine = Engine(FakeDevice(64, opts, vocab=VOCAB), opts)
    requests = family("f", range(3, 43), 4, max_new_tokens=9, eos_ids=NEVER)
    for one in requests:
        engine.add(one)
    engine.step()
    engine.abort("f-0")
    engine.abort("f-2")
    tokens, last = drain(engine)
    check([requests[1], requests[3]], tokens, last)
    for one in family("g", range(3, 43), 3, max_new_tokens=9, eos_ids=NEVER):
        engine.add(one)
    for _ in range(3):
        engine.step()
    for choice in range(3):
        engine.abort(f"g-{choice}")
    drain(engine)
    assert engine.stats().blocks_used == 0


def test_a_family_with_nan_logits_fails_whole_and_alone():
    requests = family("f", [*range(3, 20), NAN_TOKEN], 3, max_new_tokens=5, eos_ids=NEVER)
    good = request("good", range(3, 20), max_new_tokens=5, eos_ids=NEVER)
    _, last, _, _ = run([*requests, good])
    assert [last[one.request_id].finish_reason for one in requests] == ["error"] * 3
    assert last["good"].token_ids == continue_alone(good, VOCAB)[0]


def token_request(choice: int, *, shared: bool) -> TokenRequest:
    config = GenerationConfig(max_new_tokens=24, top_k=0, temperature=1.0, logprobs=2, repetition_penalty=1.1)
    return TokenRequest(
        request_id=str(choice),
        prompt_ids=tuple(5 + (i * 37) % 300 for i in range(45)),
        config=config,
        seed=77,
        choice=choice,
        max_new_tokens=24,
        limit="max_new_tokens",
        eos_ids=(2,),
        family="f" if shared else None,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_gpu_blocks": 64},
        {"num_gpu_blocks": 64, "enable_prefix_caching": False, "max_prefill_token_num": 7},
        {"num_gpu_blocks": 9, "prefill_interval": 1},
        {"num_gpu_blocks": 9, "enable_prefix_caching": False},
    ],
    ids=["roomy", "in chunks", "preempted", "preempted, no cache"],
)
def test_a_real_models_choices_are_those_of_separate_requests(tiny_model_dir: Path, options):
    apart = make_engine(tiny_model_dir, block_size=16, num_gpu_blocks=64)
    expected = [run_model(apart, [token_request(choice, shared=False)])[str(choice)] for choice in range(5)]
    engine = make_engine(tiny_model_dir, block_size=16, max_batch_size=8, **options)
    together = run_model(engine, [token_request(choice, shared=True) for choice in range(5)])
    for choice, alone in enumerate(expected):
        ours = together[str(choice)]
        assert ours.token_ids == alone.token_ids
        assert [row.logprob for row in ours.logprobs] == pytest.approx([row.logprob for row in alone.logprobs], abs=1e-4)
    assert len({one.token_ids for one in expected}) == 5
    stats = engine.stats()
    if options["num_gpu_blocks"] == 9:
        assert stats.preemptions > 0, "the pool was large enough: nothing was tested"
    else:
        assert stats.computed_tokens <= 45 + 4 + 5 * 24
