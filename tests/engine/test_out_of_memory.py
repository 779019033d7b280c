"""Steps that the device has no memory for: put back, planned again in smaller steps, and no answer is another one for it."""

from __future__ import annotations

import logging
import random

import pytest
from engine_on_fake import check, drain, run
from fake_device import FakeDevice, FakeOptions, request
from hypothesis import given, settings
from hypothesis import strategies as st
from random_jobs import jobs, shapes

from engine import engine as engine_module
from engine.budget import RECOVER_AFTER, TokenBudget
from engine.engine import Engine


@given(jobs(), shapes, st.integers(0, 12), st.integers(1, 30), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_any_mixture_under_any_shortage_gives_each_request_what_it_gets_alone(requests, shape, spare, most, draw):
    """Half of the steps of more than `most` tokens find no memory; each leaves garbage behind it."""
    size = shape["block_size"]
    num_blocks = max(-(-len(one.prompt_ids) // size) for one in requests) + spare

    def memory(plan) -> bool:
        return plan.num_tokens <= most or draw.random() < 0.5

    tokens, last, _, engine = run(requests, num_blocks=num_blocks, memory=memory, **shape)
    check(requests, tokens, last, num_blocks=num_blocks, block_size=size)
    assert engine.stats().blocks_used == 0


def test_a_shortage_is_told_once_a_step_and_passes(caplog):
    """The memory comes back after a while: the budget grows again, and the log says both."""
    caplog.set_level(logging.INFO, logger="engine.engine")
    requests = [request(f"r{number}", [number + 3] * 20, max_new_tokens=230, ignore_eos=True) for number in range(8)]
    tight = [True]

    def memory(plan) -> bool:
        return plan.num_tokens <= 5 or not tight[0]

    options = FakeOptions(max_batch_size=8, max_prefill_token_num=64)
    device = FakeDevice(256, options, memory=memory)
    engine = Engine(device, options)
    for one in requests:
        engine.add(one)
    reports = [report for _ in range(40) for report in engine.step()]
    assert not reports
    assert engine.stats().steps_put_back >= 4
    assert max(plan.num_tokens for plan in device.plans) <= 5
    tight[0] = False
    tokens, last = drain(engine)
    check(requests, tokens, last, num_blocks=256)
    assert max(plan.num_tokens for plan in device.plans) == 8
    events = [record.event for record in caplog.records]
    assert events.count("step_put_back") == engine.stats().steps_put_back
    assert events[-1] == "steps_recovered"
    assert engine.stats().preemptions == 0


def test_a_request_that_fits_in_no_step_fails_alone(monkeypatch):
    """Its tokens don't fit even one by one; the others, before and after it, get their answers."""
    monkeypatch.setattr(engine_module, "_PAUSE_S", 0)
    requests = [request(name, [number] * 30, max_new_tokens=6) for number, name in enumerate("abc", 3)]
    requests.insert(1, request("heavy", [9] * 10))

    def memory(plan) -> bool:
        heavy = next((slot for slot, one in device.slots.items() if one.request.request_id == "heavy"), None)
        admits = any(one.request.request_id == "heavy" for one in plan.admitted)
        return not admits and (heavy is None or all(row.slot != heavy for row in plan.rows))

    options = FakeOptions(max_batch_size=2)
    device = FakeDevice(64, options, memory=memory)
    engine = Engine(device, options)
    for one in requests:
        engine.add(one)
    tokens, last = drain(engine)
    error = last.pop("heavy").error
    assert error.code == "out_of_device_memory"
    assert "free what other processes hold" in error.message
    del tokens["heavy"]
    check([one for one in requests if one.request_id != "heavy"], tokens, last)
    assert engine.stats().failed == 1


def test_a_request_that_never_fits_is_tried_for_a_while(monkeypatch):
    monkeypatch.setattr(engine_module, "_PAUSE_S", 0)
    tries = []
    _, last, _, engine = run([request("r", [3])], memory=lambda plan: tries.append(plan) is not None)
    assert last["r"].error.code == "out_of_device_memory"
    assert len(tries) == engine_module._MOST_TRIES == engine.stats().steps_put_back


def test_the_budget_halves_at_once_and_doubles_slowly():
    budget = TokenBudget(100)
    assert budget.shrink(80)
    assert budget.now == 40
    assert not any(budget.grow() for _ in range(RECOVER_AFTER))
    assert budget.now == 80
    assert [budget.grow() for _ in range(RECOVER_AFTER)].index(True) == RECOVER_AFTER - 1
    assert (budget.now, budget.grow()) == (100, False)
    assert not budget.shrink(1)
    assert budget.now == 1


@pytest.mark.parametrize("seed", range(3))
def test_many_requests_in_little_memory(seed):
    """A device whose memory comes and goes."""
    draw = random.Random(seed)
    requests = [
        request(
            f"r{number}", [draw.randrange(3, 7) for _ in range(draw.randrange(1, 60))], max_new_tokens=draw.randrange(1, 30)
        )
        for number in range(60)
    ]
    most = [64]

    def memory(plan) -> bool:
        if draw.random() < 0.1:
            most[0] = draw.choice([2, 8, 64])
        return plan.num_tokens <= most[0]

    tokens, last, _, engine = run(requests, memory=memory, num_blocks=40)
    check(requests, tokens, last, num_blocks=40)
    assert engine.stats().steps_put_back > 3
