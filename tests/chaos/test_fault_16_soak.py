"""Fault 16 in its short form: seconds that show the stream flows and is judged; five minutes are `python tests/chaos/soak.py --minutes 5`."""

from __future__ import annotations

import fault_16_soak
import pytest


@pytest.mark.slow
def test_a_short_soak_is_flat() -> None:
    counts = fault_16_soak.run(long=False, seed=7, say=print)
    assert counts["rows"] > 50
    assert counts["lost"] == 0


def test_a_step_is_no_slope_and_a_leak_is() -> None:
    times = [index / 360 for index in range(361)]
    assert fault_16_soak.theil_sen(times, [100 + (time > 0.4) for time in times]) < 0.5
    assert fault_16_soak.theil_sen(
        times, [100 + 6 * time + (index % 7) / 3 for index, time in enumerate(times)]
    ) == pytest.approx(6, abs=0.2)
