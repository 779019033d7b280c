"""Fault 15, short; the long one is `python tests/chaos/fault.py 15 --long`."""

from __future__ import annotations

import fault_15_deploy as fault


def test_workers_are_replaced_under_load_and_nothing_is_computed_twice() -> None:
    assert fault.run(long=False, seed=1, say=print)["workers_replaced"] == 1
