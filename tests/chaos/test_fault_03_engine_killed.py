"""Fault 03 in its short form; the long one is `python tests/chaos/fault.py 03 --long`."""

from __future__ import annotations

import fault_03_engine_killed
import pytest


@pytest.mark.slow
def test_a_killed_engine_comes_back_and_its_worker_stays() -> None:
    counts = fault_03_engine_killed.run(long=False, seed=3, say=print)
    assert counts["deaths"] == 3
    assert counts["lost"] == 0
