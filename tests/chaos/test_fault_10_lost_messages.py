"""Fault 10, short; the long one is `python tests/chaos/fault.py 10 --long`."""

from __future__ import annotations

import fault_10_lost_messages as fault


def test_rows_outlive_the_messages_that_celery_loses() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["rows"] == 800
