"""Fault 01, short; the long one is `python tests/chaos/fault.py 01 --long`."""

from __future__ import annotations

import fault_01_kill9_loop as fault


def test_killed_workers_lose_and_double_nothing() -> None:
    assert fault.run(long=False, seed=1, say=print)["kills"] == 2
