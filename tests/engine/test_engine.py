"""The step loop over a fake device that checks every plan: the answer never depends on who else runs, or on what is evicted."""

from __future__ import annotations

import pytest
from engine_on_fake import VOCAB, Seen, check, drain, run
from fake_device import NAN_TOKEN, STOP, FakeDevice, FakeOptions, continue_alone, request
from hypothesis import given, settings
from hypothesis import strategies as st
from random_jobs import jobs, shapes

from engine.engine import Engine
from engine.plan import StepPlan


@given(jobs(), shapes, st.one_of(st.integers(0, 3), st.integers(0, 20)))
@settings(max_examples=500, deadline=None)
def test_any_mixture_in_any_pool_gives_each_request_what_it_gets_alone(requests, shape, spare):
    size = shape["block_size"]
    # From "the largest prompt just fits" upwards: most of these pools force preemption.
    num_blocks = max(-(-len(one.prompt_ids) // size) for one in requests) + spare
    tokens, last, _, engine = run(requests, num_blocks=num_blocks, **shape)
    check(requests, tokens, last, num_blocks=num_blocks, block_size=size)
    for one in requests:
        logprobs = last[one.request_id].logprobs
        assert (logprobs is None) == (one.config.logprobs is None)
        if logprobs is not None and not one.stream:
            assert [row.token_id for row in logprobs] == list(tokens[one.request_id])
            assert [row.logprob for row in logprobs] == [-float(index) for index in range(len(logprobs))]
    assert engine.stats().finished == len(requests)


@given(jobs(), shapes, st.integers(0, 6), st.data())
@settings(max_examples=300, deadline=None)
def test_random_arrivals_and_aborts_leak_nothing_and_disturb_nobody(requests, shape, spare, data):
    size = shape["block_size"]
    num_blocks = max(-(-len(one.prompt_ids) // size) for one in requests) + spare
    opts = FakeOptions(**shape)
    engine = Engine(FakeDevice(num_blocks, opts, vocab=VOCAB), opts)
    coming = list(requests)
    aborted: set[str] = set()
    seen = Seen()
    tokens, last = seen.tokens, seen.last
    for _ in range(3000):
        if coming and (data.draw(st.booleans()) or not engine.has_work):
            engine.add(coming.pop(0))
        live = [one.request_id for one in requests if one not in coming and one.request_id not in last]
        if live and data.draw(st.integers(0, 9)) == 0:
            victim = data.draw(st.sampled_from(live))
            engine.abort(victim)
            engine.abort(victim)
            aborted.add(victim)
        engine.check_integrity()
        seen.take(engine.step())
        engine.check_integrity()
        if not coming and not engine.has_work:
            break
    else:
        raise AssertionError("livelock")
    assert engine.stats().blocks_used == 0
    for one in requests:
        report = last[one.request_id]
        if report.finish_reason == "abort":
            assert one.request_id in aborted
            assert report.error.code == "aborted"
            expected, _, _ = continue_alone(one, VOCAB)
            assert tokens[one.request_id] == expected[: len(tokens[one.request_id])]
        else:
            check([one], tokens, last, num_blocks=num_blocks, block_size=size)


def test_preemption_recomputes_and_goes_on_identically():
    requests = [request(f"r{i}", [3 + i] * 14, max_new_tokens=40, ignore_eos=True, stream=True) for i in range(4)]
    # Four requests of 4 blocks in the end; the forecast believes half of that until told otherwise.
    requests = [request(one.request_id, one.prompt_ids, max_new_tokens=40, eos_ids=(10**6,), stream=True) for one in requests]
    tokens, last, device, engine = run(requests, num_blocks=8, max_batch_size=4)
    check(requests, tokens, last, num_blocks=8)
    assert engine.stats().preemptions > 0
    again = [one for plan in device.plans for one in plan.admitted if len(one.token_ids) > len(one.request.prompt_ids)]
    assert again, "nobody came back with the tokens it had"


def test_a_request_preempted_while_the_last_other_one_leaves_waits_for_its_token():
    """Found by the property test: the plan that preempted it saw nobody running any more, and let it in again at once."""
    prompt = [3] * 9 + [4, 3, 3, 4, 4, 3, 3, 3, 4, 3, 4]
    requests = [
        request("r0", prompt[:10], max_new_tokens=1),
        request("r1", prompt, max_new_tokens=38),
        request("r2", prompt, max_new_tokens=30),
        request("r3", [3], max_new_tokens=1),
    ]
    tokens, last, _, _ = run(requests, num_blocks=6, max_batch_size=2, max_prefill_token_num=21, prefill_interval=8)
    check(requests, tokens, last, num_blocks=6)


def test_a_pool_of_a_few_blocks_never_livelocks():
    requests = [request(f"r{i}", [3, 4, 5] * 5, max_new_tokens=30, eos_ids=(10**6,)) for i in range(12)]
    for num_blocks in (3, 4, 5):
        tokens, last, _, _ = run(requests, num_blocks=num_blocks, max_batch_size=12)
        check(requests, tokens, last, num_blocks=num_blocks)


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_prompts_in_chunks_give_the_same_answer(budget):
    requests = [request(f"r{i}", list(range(3, 53 + i)), max_new_tokens=12) for i in range(3)]
    tokens, last, device, _ = run(requests, max_prefill_token_num=budget)
    check(requests, tokens, last)
    assert max(plan.num_tokens for plan in device.plans) <= budget


def test_equal_prefixes_are_computed_once_even_when_they_arrive_together():
    system = list(range(100, 164))
    requests = [request(f"r{i}", [*system, 3, 4 + i], max_new_tokens=4, ignore_eos=True) for i in range(6)]
    tokens, last, device, engine = run(requests, max_prefill_token_num=512, max_batch_size=6)
    check(requests, tokens, last)
    stats = engine.stats()
    assert stats.cached_tokens == 5 * 64
    assert sum(report.cached_tokens for report in last.values()) == 5 * 64
    assert sorted(report.cached_tokens for report in last.values()) == [0] + [64] * 5
    # The first computes 66 tokens, the others two each one step later.
    assert [plan.num_tokens for plan in device.plans[:2]] == [66, 1 + 5 * 2]


def test_without_prefix_caching_nothing_is_shared():
    requests = [request(f"r{i}", list(range(3, 67)), max_new_tokens=2, ignore_eos=True) for i in range(3)]
    tokens, last, device, engine = run(requests, enable_prefix_caching=False, max_prefill_token_num=512)
    check(requests, tokens, last)
    assert engine.stats().cached_tokens == 0
    assert engine.stats().blocks_cached == 0
    assert device.plans[0].num_tokens == 3 * 64


def test_a_prompt_that_is_wholly_cached_computes_its_last_block_again():
    opts = FakeOptions()
    engine = Engine(FakeDevice(16, opts, vocab=VOCAB), opts)
    reports = []
    for name in ("first", "second"):
        engine.add(request(name, range(3, 35), max_new_tokens=3, ignore_eos=True))
        reports.append(drain(engine)[1][name])
    assert [report.cached_tokens for report in reports] == [0, 16]


def test_generated_tokens_are_found_again_by_the_next_turn():
    opts = FakeOptions()
    engine = Engine(FakeDevice(16, opts, vocab=VOCAB), opts)
    engine.add(request("turn 1", range(3, 13), max_new_tokens=30, ignore_eos=True))
    tokens, _ = drain(engine)
    engine.add(request("turn 2", [*range(3, 13), *tokens["turn 1"], 5], max_new_tokens=3, ignore_eos=True))
    # 10 + 30 tokens, of which the last was never computed: two full blocks of 16.
    assert drain(engine)[1]["turn 2"].cached_tokens == 32


def answers_with(find, *, prompt_len=5):
    """Search a prompt whose lone continuation meets `find(tokens)`."""
    for seed in range(5000):
        prompt = [3 + (seed >> shift) % 7 for shift in range(0, 3 * prompt_len, 3)]
        tokens, _, _ = continue_alone(request("x", prompt, max_new_tokens=12, eos_ids=()), VOCAB)
        if find(tokens):
            return prompt, tokens
    raise AssertionError("no such prompt")


def test_eos_at_the_last_allowed_position_is_a_stop():
    prompt, tokens = answers_with(lambda tokens: 2 not in tokens[:5] and tokens[5] == 2)
    for allowed, reason, detail, count in ((6, "stop", "eos", 5), (5, "length", "max_new_tokens", 5), (12, "stop", "eos", 5)):
        _, last, _, _ = run([request("x", prompt, max_new_tokens=allowed)])
        assert (last["x"].finish_reason, last["x"].stop_detail, last["x"].token_ids) == (reason, detail, tokens[:count])


def test_eos_as_the_last_token_that_a_session_or_a_pool_has_room_for_is_a_stop():
    prompt, tokens = answers_with(lambda tokens: 2 not in tokens[:5] and tokens[5] == 2)
    room = len(prompt) + 6
    for session_len, reason, detail in ((room, "stop", "eos"), (room - 1, "length", "session_len")):
        _, last, _, _ = run([request("x", prompt, max_new_tokens=50)], session_len=session_len)
        assert (last["x"].finish_reason, last["x"].stop_detail, last["x"].token_ids) == (reason, detail, tokens[:5])
    prompt, tokens = answers_with(lambda tokens: 2 not in tokens[:4] and tokens[4] == 2, prompt_len=4)
    _, last, _, _ = run([request("x", prompt, max_new_tokens=50)], num_blocks=1, block_size=8)
    assert (last["x"].finish_reason, last["x"].stop_detail) == ("stop", "eos")


def test_a_row_launched_after_eos_is_dropped():
    prompt, tokens = answers_with(lambda tokens: 2 not in tokens[:3] and tokens[3] == 2)
    _, last, device, engine = run([request("x", prompt, max_new_tokens=12)])
    assert last["x"].token_ids == tokens[:3]
    # Four sampled tokens, and one row that was launched before the fourth was read.
    assert len(device.plans) == 5
    assert engine.stats().generated_tokens == 4


def test_a_request_at_its_limit_gets_no_further_row():
    _, _, device, _ = run([request("x", [3, 4], max_new_tokens=5, ignore_eos=True)])
    assert len(device.plans) == 5


def test_the_callers_stop_tokens_are_named_and_ignore_eos_overrules_all():
    prompt, tokens = answers_with(lambda tokens: 2 not in tokens and STOP in tokens[1:])
    at = tokens.index(STOP)
    _, last, _, _ = run([request("x", prompt, max_new_tokens=12, stop_ids=(STOP,))])
    assert (last["x"].finish_reason, last["x"].stop_detail, last["x"].token_ids) == ("stop", f"stop_token:{STOP}", tokens[:at])
    _, last, _, _ = run([request("x", prompt, max_new_tokens=12, stop_ids=(STOP,), ignore_eos=True)])
    assert (last["x"].finish_reason, len(last["x"].token_ids)) == ("length", 12)
    _, last, _, _ = run([request("x", prompt, max_new_tokens=12, stop_ids=(STOP,), min_new_tokens=at + 1)])
    assert last["x"].token_ids[: at + 1] == tokens[: at + 1]


def test_the_session_length_ends_it_with_its_own_name():
    _, last, _, _ = run([request("x", [3] * 10, max_new_tokens=50, ignore_eos=True)], session_len=20)
    assert (last["x"].finish_reason, last["x"].stop_detail, len(last["x"].token_ids)) == ("length", "session_len", 10)
    _, last, _, _ = run([request("x", [3] * 10, max_new_tokens=200, ignore_eos=True)], num_blocks=2)
    assert (last["x"].finish_reason, last["x"].stop_detail, len(last["x"].token_ids)) == ("length", "kv_pool", 23)


def test_what_can_never_run_fails_alone():
    good = request("good", [3, 4], max_new_tokens=4, ignore_eos=True)
    bad = [
        request("long", [3] * 64),
        request("longer", [3] * 70),
        request("large", [3] * 40),
        request("empty", []),
    ]
    _, last, _, engine = run([*bad, good], num_blocks=2, session_len=64)
    codes = {name: report.error.code for name, report in last.items() if report.error}
    assert codes == {
        "long": "context_length_exceeded",
        "longer": "context_length_exceeded",
        "large": "kv_capacity",
        "empty": "invalid_request",
    }
    assert "32" in last["large"].error.message, "the message doesn't name the pool's size"
    assert len(last["good"].token_ids) == 4
    assert engine.stats().failed == 4


def test_nan_logits_fail_their_own_request_and_poison_no_prefix():
    shared = list(range(100, 132))
    opts = FakeOptions()
    engine = Engine(FakeDevice(32, opts, vocab=VOCAB), opts)
    engine.add(request("nan", [*shared, NAN_TOKEN], max_new_tokens=8))
    engine.add(request("fine", [9, 8, 7], max_new_tokens=8, ignore_eos=True))
    _, last = drain(engine)
    assert last["nan"].error.code == "numerical_error"
    assert last["fine"].error is None
    engine.add(request("after", [*shared, 5], max_new_tokens=2, ignore_eos=True))
    assert drain(engine)[1]["after"].cached_tokens == 0


def test_streams_report_each_step_and_others_only_at_the_end():
    opts = FakeOptions()
    engine = Engine(FakeDevice(32, opts, vocab=VOCAB), opts)
    engine.add(request("stream", [3, 4], max_new_tokens=6, ignore_eos=True, stream=True, logprobs=0))
    engine.add(request("whole", [3, 5], max_new_tokens=6, ignore_eos=True))
    reports = []
    while engine.has_work:
        reports += engine.step()
    by_name = {name: [one for one in reports if one.request_id == name] for name in ("stream", "whole")}
    assert [len(one.token_ids) for one in by_name["stream"]] == [1] * 6
    assert [len(one.logprobs) for one in by_name["stream"]] == [1] * 6
    assert [one.finish_reason for one in by_name["stream"]] == [None] * 5 + ["length"]
    assert [len(one.token_ids) for one in by_name["whole"]] == [6]


def test_times_are_from_add_to_first_step_to_last_token():
    opts = FakeOptions(max_batch_size=1)
    now = [0.0]
    engine = Engine(FakeDevice(32, opts, vocab=VOCAB), opts, clock=lambda: now[0])
    engine.add(request("first", [3], max_new_tokens=3, ignore_eos=True))
    engine.add(request("second", [4], max_new_tokens=2, ignore_eos=True))
    last = {}
    while engine.has_work:
        for one in engine.step():
            last[one.request_id] = one
        now[0] += 1.0
    assert (last["first"].queue_ms, last["first"].run_ms) == (0.0, 3000.0)
    assert (last["second"].queue_ms, last["second"].run_ms) == (3000.0, 2000.0)


def test_the_next_step_is_launched_before_the_last_one_is_read():
    opts = FakeOptions()
    device = FakeDevice(32, opts, vocab=VOCAB)
    engine = Engine(device, opts)
    engine.add(request("x", [3], max_new_tokens=4, ignore_eos=True))
    seen = []
    while engine.has_work:
        engine.step()
        seen.append((len(device.plans), device.read))
    assert seen == [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4)]


def test_an_abort_frees_the_blocks_at_once():
    opts = FakeOptions()
    engine = Engine(FakeDevice(8, opts, vocab=VOCAB), opts)
    engine.add(request("x", range(3, 60), max_new_tokens=20))
    engine.step()
    assert engine.stats().blocks_used == 4
    engine.abort("x")
    engine.abort("never there")
    assert engine.stats().blocks_used == 0
    (report,) = engine.step()
    assert (report.finish_reason, report.error.code) == ("abort", "aborted")
    assert not engine.has_work


def test_an_exception_of_the_device_is_not_swallowed():
    class Broken(FakeDevice):
        def launch(self, plan: StepPlan):
            raise RuntimeError("device lost")

    opts = FakeOptions()
    engine = Engine(Broken(8, opts), opts)
    engine.add(request("x", [3]))
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
