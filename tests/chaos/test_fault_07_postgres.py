"""Fault 07, short; the long one is `python tests/chaos/fault.py 07 --long`."""

from __future__ import annotations

import fault_07_postgres as fault


def test_a_postgres_that_goes_away_is_waited_for_and_wrong_sql_is_not() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["spools_replayed"] >= 1
    assert counts["outages_waited_for"] >= 1
    assert counts["bad_sql_runs"] == 1
