"""Fault 04, short; the long one is `python tests/chaos/fault.py 04 --long`."""

from __future__ import annotations

import fault_04_zombie as fault


def test_a_worker_that_wakes_up_after_two_leases_writes_nothing_more() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["chunks_fenced"] >= 1
