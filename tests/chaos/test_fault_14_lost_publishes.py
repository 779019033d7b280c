"""Fault 14, short; the long one is `python tests/chaos/fault.py 14 --long`."""

from __future__ import annotations

import fault_14_lost_publishes as fault


def test_what_never_got_to_redis_is_sent_again_after_its_grace() -> None:
    counts = fault.run(long=False, seed=1, say=print)
    assert counts["slowest_heal_s"] <= counts["allowed_s"]
