"""Conversations of several turns, streamed turns, and stopping what runs in a session, on a real engine with a tiny model."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pipelines import SMALL, assert_idle

from engine.async_engine import AsyncEngine
from headrace import GenerationConfig, InvalidRequest, pipeline

GREEDY = GenerationConfig(max_new_tokens=12)
ENDLESS = GenerationConfig(max_new_tokens=None, ignore_eos=True)
USER = [{"role": "user", "content": "turn the wheel"}]


@pytest.fixture(scope="module")
def pipe(tiny_model_dir: Path) -> Iterator[AsyncEngine]:
    with pipeline(str(tiny_model_dir), backend_config=SMALL) as made:
        yield made


def test_chat_keeps_the_history(pipe: AsyncEngine) -> None:
    session = pipe.chat("turn the wheel", gen_config=GREEDY)
    assert session.history == [("turn the wheel", pipe("turn the wheel", GREEDY).text)]
    pipe.chat("again", session, GREEDY)
    talk = [*USER, {"role": "assistant", "content": session.history[0][1]}, {"role": "user", "content": "again"}]
    assert session.response is not None
    assert session.response.text == pipe(talk, GREEDY).text
    pipe.chat("", session, GREEDY)
    assert session.response.error_code == "invalid_request"
    assert len(session.history) == 2
    session.close()
    assert session.history == []


def test_a_streamed_turn_is_in_the_history_when_it_was_read(pipe: AsyncEngine) -> None:
    session = pipe.session()
    turn = pipe.chat("turn the wheel", session, GREEDY, stream_response=True)
    first = next(turn)
    assert session.history == []
    with pytest.raises(InvalidRequest, match="still running"):
        pipe.chat("me too", session, GREEDY)
    text = first.text + "".join(piece.text for piece in turn)
    assert session.history == [("turn the wheel", text)]
    assert first.session_id == session.session_id != pipe.session().session_id
    assert text == pipe("turn the wheel", GREEDY).text  # type: ignore[union-attr]
    assert [piece.error_code for piece in pipe.chat("", session, stream_response=True)] == ["invalid_request"]
    left = pipe.chat("again", session, ENDLESS, stream_response=True)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert len(session.history) == 1
    assert_idle(pipe)


def test_a_session_is_stopped_from_another_thread_and_ended(pipe: AsyncEngine) -> None:
    session = pipe.chat("turn the wheel", gen_config=GREEDY)
    talk = threading.Thread(target=pipe.chat, args=("again", session, ENDLESS))
    talk.start()
    while not pipe.report()["stats"]["in_engine"]:
        time.sleep(0.001)
    pipe.stop_session(session.session_id)
    talk.join(30)
    assert session.response is not None
    assert (session.response.finish_reason, session.response.error_code) == ("abort", "aborted")
    assert len(session.history) == 1
    assert_idle(pipe)
    pipe.stop_session(session)  # nothing runs: nothing happens
    pipe.end_session(session.session_id)
    assert session.history == []
    pipe.end_session(10**9)


def test_a_reader_that_leaves_at_the_finish_reason_has_its_turn_kept(pipe: AsyncEngine) -> None:
    session = pipe.session()
    for turn in range(3):
        for piece in pipe.chat("turn the wheel", session, GREEDY, stream_response=True):
            if piece.finish_reason is not None:
                break
        assert len(session.history) == turn + 1
        assert session.response is not None
        assert session.response.text == session.history[-1][1]


def test_a_stopped_session_is_free_though_its_stream_is_kept(pipe: AsyncEngine) -> None:
    session = pipe.session()
    left = pipe.chat("turn the wheel", session, ENDLESS, stream_response=True)
    next(left)
    pipe.stop_session(session)
    pipe.chat("again", session, GREEDY)
    assert [user for user, _ in session.history] == ["again"]
    assert [piece.error_code for piece in left][-1] == "aborted"
    after = pipe.chat("and again", session, ENDLESS, stream_response=True)
    next(after)
    with pytest.raises(InvalidRequest, match="still running"):
        pipe.chat("me too", session, GREEDY)
    pipe.end_session(session)
    assert [piece.error_code for piece in after][-1] == "aborted"
    assert_idle(pipe)


def test_a_stopped_stream_that_was_answered_and_not_read_says_nothing_any_more(pipe: AsyncEngine) -> None:
    session = pipe.session()
    old = pipe.chat("turn the wheel", session, GREEDY, stream_response=True)
    next(old)
    while pipe.report()["stats"]["in_engine"]:
        time.sleep(0.001)
    pipe.stop_session(session)
    pipe.chat("again", session, GREEDY)
    list(old)
    assert [user for user, _ in session.history] == ["again"]
    last = pipe.chat("and again", session, GREEDY, stream_response=True)
    next(last)
    pipe.end_session(session)
    list(last)
    assert session.history == []


def test_stopping_a_session_is_not_stopping_a_number_of_the_callers(pipe: AsyncEngine) -> None:
    session = pipe.session()

    async def main() -> None:
        got = []
        async for piece in pipe.generate("water", ENDLESS, session_id=session.session_id):
            got.append(piece)
            if len(got) == 1:
                pipe.stop_session(session)
            if len(got) == 5:
                pipe.stop_session(session.session_id)
        assert len(got) >= 5
        assert got[-1].error_code == "aborted"

    asyncio.run(main())


def test_a_stream_that_the_garbage_collector_ends_while_a_turn_is_submitted(
    pipe: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering a prompt allocates enough for a collection, and the stream's last words run on the thread that submits."""

    class Widget:
        turn: Iterator[Any]
        me: Widget

    abandoned = Widget()
    abandoned.me = abandoned
    abandoned.turn = pipe.chat("turn the wheel", None, ENDLESS, stream_response=True)
    next(abandoned.turn)
    submit = pipe.frontend.submit

    def collecting(*args: Any, **kwargs: Any) -> int:
        gc.collect()
        return submit(*args, **kwargs)

    monkeypatch.setattr(pipe.frontend, "submit", collecting)
    del abandoned
    talk = threading.Thread(target=pipe.chat, args=("hi", None, GREEDY), daemon=True)
    talk.start()
    talk.join(30)
    assert not talk.is_alive(), "it waits for itself"
    assert_idle(pipe)


def test_what_is_no_turn_is_refused_by_name(pipe: AsyncEngine) -> None:
    with pytest.raises(InvalidRequest, match="text, not list") as refused:
        pipe.chat(USER)  # type: ignore[call-overload]  # what is refused
    assert refused.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="not int") as refused:
        pipe.chat("hi", 5)  # type: ignore[call-overload]  # what is refused
    assert refused.value.param == "session"


def test_generate_under_one_id_again_and_again(pipe: AsyncEngine) -> None:
    """A reader that leaves at the end may come back at once; and a number of the caller's is no number of `chat`'s."""
    session = pipe.session()
    turn = pipe.chat("turn the wheel", session, ENDLESS, stream_response=True)
    next(turn)

    async def main() -> None:
        for _ in range(40):
            async for piece in pipe.generate("water", GREEDY, session_id=session.session_id):
                if piece.finish_reason is not None:
                    break

    asyncio.run(main())
    turn.close()  # type: ignore[attr-defined]  # a generator's
    assert_idle(pipe)


def test_async_calls_need_no_place_in_the_loops_pool_and_end_when_cancelled(pipe: AsyncEngine) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        calls = [asyncio.ensure_future(pipe.async_batch_infer(["water"] * 20, ENDLESS)) for _ in range(4)]
        for _ in range(1000):
            stats = pipe.report()["stats"]
            if stats["pending"] + stats["in_engine"] > 60:  # all four calls are inside
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail(f"the calls wait for each other: {stats}")
        for call in calls:
            call.cancel()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in ended] == [asyncio.CancelledError] * 4
        assert [piece async for piece in pipe.generate("wheel", GREEDY)]
        threads = threading.active_count()
        many = [asyncio.ensure_future(pipe.async_batch_infer("water", GREEDY)) for _ in range(200)]
        await asyncio.sleep(0.05)
        assert threading.active_count() <= threads + 1, "a thread for each call would be thousands"
        assert len({answer.text for answer in await asyncio.gather(*many)}) == 1
        answers = await pipe.async_batch_infer((word * length for word, length in (("water ", 40), ("a", 1), ("b", 1))), GREEDY)
        assert [answer.index for answer in answers] == [0, 1, 2]
        assert (await pipe.async_batch_infer("water", GREEDY)).text == pipe("water", GREEDY).text  # type: ignore[union-attr]  # one prompt, one answer
        with pytest.raises(InvalidRequest, match="prompts is"):
            await pipe.async_batch_infer(5)

    asyncio.run(main())
    assert_idle(pipe)


def test_generate_under_a_session_id(pipe: AsyncEngine) -> None:
    async def main() -> None:
        got = []
        async for piece in pipe.generate("water", ENDLESS, session_id=77):
            got.append(piece)
            if len(got) == 1:
                with pytest.raises(InvalidRequest, match="session 77"):
                    await anext(pipe.generate("mill", GREEDY, session_id=77))
                pipe.stop_session(77)
        assert {piece.session_id for piece in got} == {77}
        assert [piece.error_code for piece in got if piece.error_code] == ["aborted"]
        assert [piece.session_id async for piece in pipe.generate("water", GREEDY)][0] == 0  # noqa: RUF015

    asyncio.run(main())


def test_generate_cancelled_while_it_submits_leaves_nothing_behind(pipe: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, submitting, go_on = pipe.frontend.submit, threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> int:
        submitting.set()
        go_on.wait(10)
        return submit(*args, **kwargs)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(pipe.frontend, "submit", slow)
            task = asyncio.ensure_future(anext(pipe.generate("water", ENDLESS, session_id=88)))
            await asyncio.to_thread(submitting.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            await asyncio.sleep(0.2)
        assert [piece async for piece in pipe.generate("mill", GREEDY, session_id=88)]

    asyncio.run(main())
    assert_idle(pipe)
