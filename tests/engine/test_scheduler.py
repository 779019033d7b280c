"""Policy: when prompts are let in, who gives way, what the forecast says, and what a step costs."""

from __future__ import annotations

import sys
from types import FrameType, SimpleNamespace

import pytest
from fake_device import FakeDevice, FakeOptions, request
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.forecast import LEARN_AFTER, Forecast, Load, OutputLengths
from engine.plan import StepOutput, StepPlan

NEVER = (10**6,)


def make(num_blocks: int = 200, **options):
    opts = FakeOptions(**options)
    device = FakeDevice(num_blocks, opts)
    return Engine(device, opts), device


def admissions(device: FakeDevice) -> list[int]:
    """Steps that admitted somebody."""
    return [plan.step for plan in device.plans if plan.admitted]


@pytest.mark.parametrize("interval", [1, 5, 1000])
def test_prefill_interval_bounds_the_steps_between_admissions(interval):
    engine, device = make(max_batch_size=8, prefill_interval=interval, max_prefill_token_num=64)
    # Five of eight run: more than half, so that a waiting prompt waits for the interval (or for the others' end).
    for index in range(5):
        engine.add(request(f"r{index}", [3 + index], max_new_tokens=40, ignore_eos=True))
    for _ in range(2):
        engine.step()
    engine.add(request("late", [9], max_new_tokens=2, ignore_eos=True))
    while engine.has_work:
        engine.step()
    first, late = admissions(device)
    # With no interval passed it comes in when nobody has anything to compute any more: the five end with step 40.
    assert (first, late) == (1, {1: 3, 5: 6, 1000: 40}[interval])


def test_a_full_budget_of_waiting_tokens_does_not_wait_for_the_interval():
    engine, device = make(max_batch_size=4, prefill_interval=1000, max_prefill_token_num=32)
    for index in range(3):
        engine.add(request(f"r{index}", [3 + index], max_new_tokens=40, ignore_eos=True))
    engine.step()
    engine.add(request("a", range(100, 120), max_new_tokens=2, ignore_eos=True))
    engine.step()
    assert admissions(device) == [1]
    engine.add(request("b", range(200, 220), max_new_tokens=2, ignore_eos=True))
    engine.step()
    assert admissions(device) == [1, 3]


@pytest.mark.parametrize(("worthwhile_tokens", "bunch"), [(1, 1), (12, 3), (1000, 6)])
def test_of_a_deep_queue_so_many_come_in_that_their_step_is_worth_its_launch(worthwhile_tokens, bunch):
    """Eight of 16 requests end, one a step; 40 prompts of 4 tokens wait. A full step holds six of them beside the others' 8 tokens."""
    opts = FakeOptions(max_batch_size=16, prefill_interval=1000, max_prefill_token_num=32)
    device = FakeDevice(500, opts)
    device.worthwhile_tokens = worthwhile_tokens
    engine = Engine(device, opts)
    for index in range(56):
        length = 30 + index if index < 8 else 100
        engine.add(request(f"r{index}", range(3 + index, 7 + index), max_new_tokens=length, ignore_eos=True))
    while engine.stats().finished < 8:
        engine.step()
    assert {len(plan.admitted) for plan in device.plans if plan.step > 30 and plan.admitted} == {bunch}


def test_below_half_of_the_batch_prompts_come_in_at_once():
    engine, device = make(max_batch_size=8, prefill_interval=1000)
    for index in range(4):
        engine.add(request(f"r{index}", [3 + index], max_new_tokens=10, ignore_eos=True))
        engine.step()
    assert admissions(device) == [1, 2, 3, 4]
    for index in range(2):
        engine.add(request(f"more{index}", [30 + index], max_new_tokens=10, ignore_eos=True))
        engine.step()
    assert admissions(device) == [1, 2, 3, 4]


def test_running_requests_go_on_while_a_long_prompt_comes_in_chunks():
    engine, device = make(max_batch_size=4, max_prefill_token_num=10)
    engine.add(request("short", [3], max_new_tokens=20, ignore_eos=True))
    engine.step()
    engine.add(request("long", range(100, 145), max_new_tokens=2, ignore_eos=True))
    for _ in range(5):
        engine.step()
    assert [[row.count for row in plan.rows] for plan in device.plans] == [[1], *[[1, 9]] * 5]
    assert [plan.rows[-1].samples for plan in device.plans[1:]] == [False] * 4 + [True]


def test_the_batch_stays_full_while_work_waits():
    engine, device = make(max_batch_size=8, prefill_interval=1, num_blocks=500)
    for index in range(24):
        engine.add(request(f"r{index}", [3 + index] * 4, max_new_tokens=3 + (index * 7) % 30, ignore_eos=True))
    busy = []
    while engine.has_work:
        waiting = engine.stats().waiting
        engine.step()
        if waiting:
            busy.append(len(device.plans[-1].rows))
    # A slot is empty for no step: whoever has his last row in step N is followed by another one in step N+1.
    assert set(busy) == {8}


def test_the_youngest_gives_way_and_comes_back_before_those_who_never_ran():
    # Both of the first grow to 4 blocks of 16; the pool has 6.
    engine, device = make(num_blocks=6, max_batch_size=2, prefill_interval=1)
    for name, first in (("old", 3), ("young", 4)):
        engine.add(request(name, [first] * 10, max_new_tokens=50, eos_ids=NEVER))
    engine.add(request("third", [5] * 10, max_new_tokens=5, ignore_eos=True))
    order = []
    while engine.has_work:
        engine.step()
    for plan in device.plans:
        order += [one.request.request_id for one in plan.admitted]
    assert engine.stats().preemptions == 1
    assert order == ["old", "young", "young", "third"]


def test_a_preempted_request_waits_until_blocks_are_released():
    """Else it takes the blocks that it had to give, is preempted again, and each round computes its prompt anew."""
    engine, _ = make(num_blocks=12, max_batch_size=6, prefill_interval=1, session_len=1000)
    for index in range(6):
        engine.add(request(f"r{index}", [3 + index] * 20, max_new_tokens=100, eos_ids=NEVER))
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert stats.preemptions <= 6
    assert stats.computed_tokens <= 1.5 * 6 * 120


def test_the_forecast_prevents_preemption_where_lengths_are_known():
    engine, _ = make(num_blocks=20, max_batch_size=16, prefill_interval=1)
    for index in range(16):
        engine.add(request(f"r{index}", [3 + index] * 16, max_new_tokens=16 * (1 + index % 4), ignore_eos=True))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats().blocks_used)
    assert engine.stats().preemptions == 0
    assert most >= 15, "the forecast leaves the pool empty"


def test_nobody_is_let_in_beside_one_that_takes_the_whole_pool():
    """Who comes in with it, in the same step, would be thrown out again, and its prompt computed twice."""
    engine, _ = make(num_blocks=10, max_batch_size=4, prefill_interval=1, max_prefill_token_num=256)
    engine.add(request("all", [3] * 100, max_new_tokens=60, ignore_eos=True))
    engine.add(request("small", [4] * 16, max_new_tokens=60, ignore_eos=True))
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.preemptions, stats.computed_tokens) == (0, 100 + 16 + 2 * 59)


loads = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda pair: Load(*pair)), max_size=8)


@given(loads)
@settings(max_examples=200, deadline=None)
def test_the_peak_is_what_a_simulation_reaches(some):
    reached = max((sum(one.size + step for one in some if one.left >= step) for step in range(22)), default=0)
    assert Forecast(some, capacity=0).peak() == reached


@given(loads, st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_a_load_is_added_exactly_when_the_peak_stays_within(some, capacity):
    forecast = Forecast([], capacity=capacity)
    inside: list[Load] = []
    for load in some:
        fits = Forecast([*inside, load], capacity=0).peak() <= capacity
        assert forecast.add(load) == fits
        if fits:
            inside.append(load)
        assert forecast.peak() == Forecast(inside, capacity=0).peak()


def test_lengths_are_believed_after_enough_completions():
    lengths = OutputLengths()
    assert lengths.expect_left(0, 100) == 50
    assert lengths.expect_left(40, 100) == 10
    assert lengths.expect_left(80, 100) == 10
    for index in range(LEARN_AFTER - 1):
        lengths.record(10 if index % 2 else 30)
    assert lengths.expect_left(0, 100) == 50
    lengths.record(10)
    assert 19 <= lengths.expect_left(0, 100) <= 21
    assert lengths.expect_left(15, 100) == 15
    # Longer than anything seen: half of what is left.
    assert lengths.expect_left(60, 100) == 20
    assert lengths.expect_left(0, 5) == 5


@given(st.lists(st.integers(0, 50), min_size=LEARN_AFTER, max_size=LEARN_AFTER), st.integers(0, 60), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_an_expectation_is_never_more_than_what_is_allowed_nor_negative(seen, generated, room):
    lengths = OutputLengths()
    for length in seen:
        lengths.record(length)
    assert 0 <= lengths.expect_left(generated, generated + room) <= room


class Instant:
    """An executor that answers at once, to time the host alone."""

    num_blocks = 40_000
    worthwhile_tokens = 1

    def launch(self, plan: StepPlan):
        output = StepOutput(step=plan.step, tokens=(5,) * sum(row.samples for row in plan.rows))
        return SimpleNamespace(result=lambda: output)

    def close(self) -> None:
        pass


def calls_of_a_step(requests: int) -> float:
    """Python and C calls that the host makes in a decode step of so many requests, a mean of 64 steps."""
    opts = FakeOptions(block_size=64, max_batch_size=1024, max_prefill_token_num=16384, session_len=4096)
    engine = Engine(Instant(), opts)
    for index in range(requests):
        engine.add(request(str(index), [3 + index] * (60 + index % 300), max_new_tokens=3000, eos_ids=NEVER))
    while engine.stats().waiting:
        engine.step()
    calls = 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        for _ in range(64):
            engine.step()
    finally:
        sys.setprofile(before)
    return calls / 64


def test_what_a_step_costs_the_host_grows_with_its_requests_and_no_faster():
    """Calls are counted, not seconds: a busy machine must not fail it. Some 9 calls a request were 0.6 ms a step of 1,024."""
    few, many = calls_of_a_step(256), calls_of_a_step(1024)
    assert many < 12 * 1024
    assert many < 4.4 * few, "something in the step grows faster than the number of its requests"
