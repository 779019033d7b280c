"""When prompts join a step, and what a profile says of it; the scheduler's part is in test_scheduler.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.admission import Admissions
from engine.profile import StepProfile

DEEP: dict[str, Any] = {
    "running": 12, "free_slots": 4, "waiting": 100, "waiting_tokens": 5000, "budget": 1000, "has_chunks": False,
}  # fmt: skip


def rule(worthwhile_tokens: int, prefill_interval: int = 1000) -> Admissions:
    return Admissions(max_batch_size=16, prefill_interval=prefill_interval, worthwhile_tokens=worthwhile_tokens)


@pytest.mark.parametrize(
    ("worthwhile_tokens", "changed", "due"),
    [
        (1, {}, True),
        (200, {}, True),  # 4 slots of 50 tokens
        (201, {}, False),
        (201, {"free_slots": 5}, True),
        (1 << 30, {"free_slots": 20}, True),  # never more than a full step
        (1 << 30, {"free_slots": 19}, False),
        (1 << 30, {"running": 7}, True),
        (1 << 30, {"has_chunks": True}, True),
        (1, {"waiting_tokens": 999}, False),
        (1, {"waiting_tokens": 999, "has_chunks": True}, False),
        (100, {"waiting": 2, "waiting_tokens": 1000, "free_slots": 4}, True),
    ],
)
def test_a_deep_queue(worthwhile_tokens: int, changed: dict[str, Any], due: bool) -> None:
    assert rule(worthwhile_tokens).are_due(**{**DEEP, **changed}) == due


def test_after_the_interval_in_any_case() -> None:
    one = rule(1 << 30, prefill_interval=3)
    found = []
    for _ in range(8):
        one.count_step()
        found.append(one.are_due(**DEEP))
        if found[-1]:
            one.count_prompt()
    assert found == [False, False, True] * 2 + [False, False]


def test_tokens_that_the_cache_has_are_no_work() -> None:
    one = rule(200)
    for _ in range(200):
        one.learn(3, 99)
    assert not one.are_due(**DEEP)
    for _ in range(200):
        one.learn(99, 99)
    assert one.are_due(**{**DEEP, "free_slots": 5})


@pytest.mark.parametrize(
    ("host_ms", "token_us", "decode_ms", "tokens"),
    [
        (20.0, 1.0, 2.0, 32768),
        (15.0, 22.0, 11.0, 256),
        (10.0, 22.0, 11.0, 1),
        (10.0, 22.0, math.inf, 1),
        (11.02, 22.0, 11.0, 1),
    ],
)
def test_what_is_worth_a_step(host_ms: float, token_us: float, decode_ms: float, tokens: int) -> None:
    assert StepProfile(0, host_ms, token_us).worthwhile_tokens(decode_ms) == tokens
