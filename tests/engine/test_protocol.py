"""Frames survive being torn anywhere, and nothing but a message of ours is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import protocol
from engine.protocol import (
    Abort,
    AskReport,
    Close,
    Failed,
    FrameReader,
    Meeting,
    Message,
    Outputs,
    ProtocolError,
    Ready,
    Report,
    Start,
    Submit,
    Tick,
    encode,
    submissions,
)
from engine.request import TokenOutput, TokenRequest
from headrace.completion import CompletionError, TokenLogprobs
from headrace.config import GenerationConfig

REQUEST = TokenRequest(
    request_id="1-0",
    prompt_ids=(1, 2, 3),
    config=GenerationConfig(stop_words=["水", "🙂"], logit_bias={3: 1.5}, random_seed=2**64 - 1, bad_token_ids=[4]),
    seed=2**64 - 1,
    choice=2,
    max_new_tokens=7,
    limit="session_len",
    eos_ids=(2,),
    stop_ids=(9,),
    bad_sequences=((4,), (5, 6)),
    stream=True,
    family="\ud800",
)
OUTPUTS = (
    TokenOutput(
        request_id="1-0",
        token_ids=(4, 5),
        logprobs=(
            TokenLogprobs(token_id=4, logprob=-0.5, top=((4, -0.5), (7, -1.25))),
            TokenLogprobs(token_id=5, logprob=float("-inf")),
        ),
        queue_ms=1.5,
    ),
    TokenOutput(
        request_id="2-0",
        token_ids=(),
        finish_reason="error",
        error=CompletionError(code="kv_capacity", message="too long \ud800"),
    ),
)
MESSAGES: list[Message] = [
    Start(options={"tp": 2}, rank=1, size=2, rendezvous="127.0.0.1:1", log_level="INFO"),
    Submit((REQUEST, REQUEST)),
    Abort(("1-0", "2-0")),
    AskReport(3),
    Close(),
    Meeting("127.0.0.1:1"),
    Ready(100, {"device": "cpu"}),
    Failed("model_load_error", "no", "model_path"),
    Outputs(OUTPUTS),
    Tick(5),
    Report(3, {"steps": 1}),
]


@given(cuts=st.lists(st.integers(1, 300), max_size=40))
def test_torn_frames(cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in MESSAGES)
    reader, got = FrameReader(), []
    while stream:
        size = cuts.pop() if cuts else len(stream)
        got += list(reader.feed(stream[:size]))
        stream = stream[size:]
    assert got == MESSAGES


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'["Nobody",{}]',
        b'["Close",{"x":1}]',
        b'["Submit",{"requests":[{}]}]',
        b"\xff\xfe",
        json.dumps(["Tick"]).encode(),
    ],
)
def test_what_is_no_message(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(len(body).to_bytes(4, "big") + body))


def test_text_on_the_pipe_is_no_frame() -> None:
    with pytest.raises(ProtocolError, match="something else writes"):
        list(FrameReader().feed(b"Loading checkpoint shards: 100%"))


def test_requests_with_long_prompts_are_submitted_in_frames_that_the_other_side_takes() -> None:
    """128 choices of each of 8 prompts of a million tokens fit a window; one message of them would be 7 GB."""
    prompt = tuple(range(100_000, 131_072)) * 32
    requests = [replace(REQUEST, request_id=f"{number}", prompt_ids=prompt) for number in range(1024)]
    longest = protocol._MOST // len(encode(Submit((requests[0],))))
    assert longest < 200, "they fit one frame: nothing was tested"
    messages = list(submissions(requests))
    assert [one for message in messages for one in message.requests] == requests
    assert max(len(message.requests) for message in messages) <= longest
    assert len(messages) < 1024 / 3, "a message for each"
    assert list(submissions([])) == []
    alone = replace(REQUEST, prompt_ids=prompt * 5)
    assert list(submissions([alone, REQUEST, REQUEST])) == [Submit((alone,)), Submit((REQUEST, REQUEST))]
