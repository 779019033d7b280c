"""Fault 12, short; the long one is `python tests/chaos/fault.py 12 --long`."""

from __future__ import annotations

import fault_12_clock_skew as fault


def test_a_wrong_clock_ends_no_lease_and_no_batch_early() -> None:
    assert fault.run(long=False, seed=1, say=print)["claimed_again"] == 0
