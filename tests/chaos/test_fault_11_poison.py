"""Fault 11 in its short form; the long one is `python tests/chaos/fault.py 11 --long`."""

from __future__ import annotations

import fault_11_poison
import pytest


@pytest.mark.slow
def test_poison_is_found_and_nobody_else_is_blamed() -> None:
    counts = fault_11_poison.run(long=False, seed=11, say=print)
    assert counts["poison"] == 1
    assert counts["innocents_blamed"] == 0
