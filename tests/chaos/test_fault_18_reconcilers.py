"""Fault 18, short; the long one is `python tests/chaos/fault.py 18 --long`."""

from __future__ import annotations

import fault_18_reconcilers as fault


def test_reconcilers_that_are_killed_and_frozen_send_what_is_missing_and_no_flood() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["messages"] <= 3 * counts["chunks"]
