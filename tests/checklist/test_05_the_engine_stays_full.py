"""Point 5: three times `max_batch_size` prompts of very uneven lengths; no slot is idle while work waits; answers in order."""

from __future__ import annotations

import random

from engine_on_fake import drain
from fake_device import FakeDevice, FakeOptions, request

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from headrace import GenerationConfig

LENGTHS = [(7 * number) % 61 + 1 for number in range(48)]


def test_occupancy() -> None:
    options = FakeOptions(max_batch_size=16, prefill_interval=1, max_prefill_token_num=256)
    device = FakeDevice(400, options)
    engine = Engine(device, options)
    shuffled = random.Random(1).sample(range(48), 48)
    for number in shuffled:
        engine.add(request(str(number), [3 + number, 4], max_new_tokens=LENGTHS[number], ignore_eos=True))
    widths = []
    while engine.stats().waiting:
        engine.step()
        if engine.stats().waiting:
            widths.append(len(device.plans[-1].rows))
    assert len(widths) > 20
    # The step that is under way when a request ends was planned a step before its successor could come in.
    assert min(widths) >= 16 - max(ends_at_once(shuffled), 1)
    assert sum(widths) / len(widths) > 15
    drain(engine)


def ends_at_once(order: list[int]) -> int:
    """Most requests of the first wave that end in the same step."""
    first = [LENGTHS[number] for number in order[:16]]
    return max(first.count(length) for length in first)


def test_order(pipe: AsyncEngine) -> None:
    configs = [GenerationConfig(max_new_tokens=length, ignore_eos=True) for length in LENGTHS]
    answers = pipe([f"prompt {number}" for number in range(48)], configs)
    assert [answer.index for answer in answers] == list(range(48))  # type: ignore[union-attr]
    assert [answer.generate_token_len for answer in answers] == LENGTHS  # type: ignore[union-attr]
