"""Fault 06, short; the long one is `python tests/chaos/fault.py 06 --long`."""

from __future__ import annotations

import fault_06_network as fault


def test_a_bad_network_delays_and_loses_nothing() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["lost"] == counts["doubled"] == 0
    assert counts["connections_reset"] > 0
