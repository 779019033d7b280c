"""Runs requests through `Engine` over the checking device, and compares each answer with what the request gets alone."""

from __future__ import annotations

from dataclasses import replace

from fake_device import FakeDevice, FakeOptions, continue_alone, score_alone

from engine.engine import Engine

VOCAB = 40


class Seen:
    """Reports of all requests: their tokens together, and each one's last report with what an earlier one said once."""

    def __init__(self) -> None:
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.last = {}
        self._scores = {}

    def take(self, outputs) -> None:
        for output in outputs:
            name = output.request_id
            assert name not in self.last, "a report after the last one"
            if output.prompt_logprobs is not None:
                assert name not in self.tokens, "scores after the first report"
                self._scores[name] = output.prompt_logprobs
            self.tokens[name] = self.tokens.get(name, ()) + output.token_ids
            if output.finish_reason is not None:
                self.last[name] = replace(output, prompt_logprobs=self._scores.get(name))


def drain(engine: Engine, *, most_steps: int = 3000):
    """Run until nothing is left; give each request's tokens and its last report."""
    seen = Seen()
    for _ in range(most_steps):
        if not engine.has_work:
            return seen.tokens, seen.last
        seen.take(engine.step())
    raise AssertionError("livelock")


def run(requests, *, num_blocks=64, vocab=VOCAB, memory=None, **options):
    opts = FakeOptions(**options)
    device = FakeDevice(num_blocks, opts, vocab=vocab, memory=memory)
    engine = Engine(device, opts)
    for one in requests:
        engine.add(one)
    tokens, last = drain(engine)
    engine.check_integrity()
    assert device.most_in_flight <= 2
    return tokens, last, device, engine


def check(requests, tokens, last, *, num_blocks=64, session_len=256, block_size=16):
    for one in requests:
        pool = num_blocks * block_size + 1
        room, cut = min((session_len, "session_len"), (pool, "kv_pool"))
        expected, reason, detail = continue_alone(one, VOCAB, most=room - len(one.prompt_ids), cut=cut)
        report = last[one.request_id]
        assert (tokens[one.request_id], report.finish_reason, report.stop_detail) == (expected, reason, detail)
        assert report.error is None
        if one.config.prompt_logprobs is not None and one.choice == 0:
            assert [(row.token_id, row.logprob) for row in report.prompt_logprobs] == score_alone(one.prompt_ids)
        else:
            assert report.prompt_logprobs is None
