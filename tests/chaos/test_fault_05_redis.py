"""Fault 05, short; the long one is `python tests/chaos/fault.py 05 --long`."""

from __future__ import annotations

import fault_05_redis as fault


def test_work_goes_on_whatever_becomes_of_redis() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["lost"] == counts["doubled"] == 0
