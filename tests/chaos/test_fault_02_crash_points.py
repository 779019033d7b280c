"""Fault 02, short; the long one is `python tests/chaos/fault.py 02 --long`."""

from __future__ import annotations

import fault_02_crash_points as fault


def test_workers_that_die_at_the_worst_moment_lose_and_double_nothing() -> None:
    assert fault.run(long=False, seed=1, say=print)["deaths"] == 3
