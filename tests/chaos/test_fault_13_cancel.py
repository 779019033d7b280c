"""Fault 13 in its short form; the long one is `python tests/chaos/fault.py 13 --long`."""

from __future__ import annotations

import fault_13_cancel
import pytest


@pytest.mark.slow
def test_a_batch_may_be_cancelled_or_expire_at_any_moment() -> None:
    counts = fault_13_cancel.run(long=False, seed=13, say=print)
    assert counts["runs"] == 6
    assert counts["lost"] == 0
