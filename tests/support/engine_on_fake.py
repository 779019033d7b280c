"""Runs requests through `Engine` over the checking device, and compares each answer with what the request gets alone."""

from __future__ import annotations

from fake_device import FakeDevice, FakeOptions, continue_alone

from engine.engine import Engine

VOCAB = 40


def drain(engine: Engine, *, most_steps: int = 3000):
    """Run until nothing is left; give each request's tokens and its last report."""
    tokens: dict[str, tuple[int, ...]] = {}
    last = {}
    for _ in range(most_steps):
        if not engine.has_work:
            return tokens, last
        for output in engine.step():
            assert output.request_id not in last, "a report after the last one"
            tokens[output.request_id] = tokens.get(output.request_id, ()) + output.token_ids
            if output.finish_reason is not None:
                last[output.request_id] = output
    raise AssertionError("livelock")


def run(requests, *, num_blocks=64, vocab=VOCAB, **options):
    opts = FakeOptions(**options)
    device = FakeDevice(num_blocks, opts, vocab=vocab)
    engine = Engine(device, opts)
    for one in requests:
        engine.add(one)
    tokens, last = drain(engine)
    engine.check_integrity()
    assert device.most_in_flight <= 2
    return tokens, last, device, engine


def check(requests, tokens, last, *, num_blocks=64, session_len=256, block_size=16):
    for one in requests:
        room = min(session_len, num_blocks * block_size + 1) - len(one.prompt_ids)
        expected, reason, detail = continue_alone(one, VOCAB, most=room)
        report = last[one.request_id]
        assert (tokens[one.request_id], report.finish_reason, report.stop_detail) == (expected, reason, detail)
        assert report.error is None
