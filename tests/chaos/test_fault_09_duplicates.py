"""Fault 09, short; the long one is `python tests/chaos/fault.py 09 --long`."""

from __future__ import annotations

import fault_09_duplicates as fault


def test_ten_copies_of_every_message_are_computed_once() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["messages"] == 10 * counts["chunks"]
