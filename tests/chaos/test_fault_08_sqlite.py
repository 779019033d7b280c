"""Fault 08, short; the long one is `python tests/chaos/fault.py 08 --long`."""

from __future__ import annotations

import fault_08_sqlite as fault


def test_sqlite_survives_its_writers_its_readers_and_its_disk() -> None:
    counts = fault.run(long=False, seed=8, say=print)
    assert counts["kills_inside_a_commit"] == 5
    assert counts["rows"] == counts["writers_rows"] + 300 + 10, (
        "of the writers, of the victims, and of the ten prompts from before"
    )
