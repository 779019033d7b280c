"""Fault 17 in its short form; the long one is `python tests/chaos/fault.py 17 --long`."""

from __future__ import annotations

import fault_17_reply_lost


def test_a_call_whose_reply_is_lost_makes_one_batch() -> None:
    counts = fault_17_reply_lost.run(long=False, seed=17, say=print)
    assert counts["batches"] == 2 * counts["rounds"]
    assert counts["replies_lost"] >= counts["rounds"]
