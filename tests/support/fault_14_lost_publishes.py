"""Redis and SQL fall out of step: a fifth of what is committed as sent never gets to Redis."""

from __future__ import annotations

import math

from fault_ground import Say, ground, texts
from fault_senders import LoggedBroker, environ_of, healing_times, sendings

TITLE = "one in five messages is lost between the commit and Redis"
SLACK_S = 1.5
"""For the sender's own turn: marking, reading and sending a group of chunks on a busy machine."""


def run(*, long: bool, seed: int, say: Say) -> dict[str, int | float]:
    """Let every sender lose messages, and measure how long each lost one is missed."""
    rows = 20_000 if long else 480
    prompts = texts(rows)
    with ground(chunk_size=16, dispatch_window=16) as field:
        log = field.folder / "sent"
        field.service.broker = LoggedBroker(field, log, lose_every=5)
        environ = dict(environ_of(log, drop_share=0.2, seed=seed))
        for _ in range(2):
            field.service.ready(field.worker(pause_s=0.3, concurrency=8, environ=environ))
        batch_id = field.service.submit(prompts)
        field.wait_over(batch_id, timeout_s=900)
        counts = field.judge(batch_id, prompts)
        sent = sendings(log)
        times = healing_times(sent)
        lost = sum(not sending.arrived for sending in sent)
        say(f"{lost} of {len(sent)} messages lost, the slowest healed after {max(times):.1f} s")
        allowed_s = field.settings.requeue_grace_s + field.settings.reconcile_interval_s + SLACK_S
        # One in five at random: four standard deviations below that is what no honest draw falls short of.
        fewest = max(1.0, 0.2 * len(sent) - 4 * math.sqrt(0.2 * 0.8 * len(sent)))
        assert lost >= fewest, f"only {lost} of {len(sent)} messages were lost"
        assert max(times) <= allowed_s, f"a lost message was missed for {max(times):.1f} s; {allowed_s} s are promised"
        return {
            **counts, "chunks": -(-rows // 16), "messages": len(sent), "messages_lost": lost,
            "slowest_heal_s": round(max(times), 2), "median_heal_s": round(sorted(times)[len(times) // 2], 2),
            "grace_s": field.settings.requeue_grace_s, "sweep_s": field.settings.reconcile_interval_s, "allowed_s": allowed_s,
            **field.again_pct(rows),
        }  # fmt: skip
