"""The engine's seat in the worker: which class is loaded, and what is refused before it is."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest
from echo_frontend import EchoEvent, EchoFrontend
from worker_process import wait_for

from headrace.config import GenerationConfig, PytorchEngineConfig
from headrace.errors import EngineError, InvalidRequest, ModelLoadError
from headrace.settings import Settings
from worker import host as worker_host
from worker.host import EngineHost, load_frontend

ECHO = Settings(model="m", engine_frontend="echo_frontend:EchoFrontend", engine_config='{"tp": 2, "max_batch_size": 3}')


def test_the_engine_gets_its_model_and_config() -> None:
    frontend = load_frontend(ECHO, lambda _: None)
    assert isinstance(frontend, EchoFrontend)
    assert frontend.model_path == "m"
    assert frontend.backend_config == PytorchEngineConfig(tp=2, max_batch_size=3)
    frontend.close()


@pytest.mark.parametrize("name", ["no_such_module:X", "echo_frontend:Missing", "echo_frontend", ""])
def test_a_wrong_engine_is_named(name: str) -> None:
    with pytest.raises(InvalidRequest, match="HEADRACE_ENGINE_FRONTEND") as caught:
        load_frontend(dataclasses.replace(ECHO, engine_frontend=name), lambda _: None)
    assert caught.value.param == "engine_frontend"


@pytest.mark.parametrize("config", ["{", "[]", '{"tp": 0}', '{"no_such_field": 1}'])
def test_a_wrong_config_is_named(config: str) -> None:
    with pytest.raises(InvalidRequest, match="HEADRACE_ENGINE_CONFIG") as caught:
        load_frontend(dataclasses.replace(ECHO, engine_config=config), lambda _: None)
    assert caught.value.param == "engine_config"


def test_an_engine_that_does_not_say_how_much_it_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(EchoFrontend, "max_running")
    with pytest.raises(InvalidRequest, match="max_running") as caught:
        load_frontend(ECHO, lambda _: None)
    assert caught.value.param == "engine_frontend"


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelLoadError):
        load_frontend(dataclasses.replace(ECHO, model="no-such-model"), lambda _: None)


def test_a_batch_size_that_nobody_gave_goes_by_the_device() -> None:
    for given, expected in (("{}", None), ('{"max_batch_size": 128}', 128)):
        frontend = load_frontend(dataclasses.replace(ECHO, engine_config=given), lambda _: None)
        assert frontend.backend_config.max_batch_size is expected  # type: ignore[attr-defined]  # the echo engine keeps it
        frontend.close()


def test_room_is_for_what_runs_and_for_what_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    # The host's own clock: an event loop of this process that saw it would sleep for hours.
    monkeypatch.setattr(worker_host, "time", SimpleNamespace(monotonic=lambda: clock))
    engine = EchoFrontend("m", pause_s=30)
    engine.max_running = 100
    host = EngineHost(lambda _: engine, stall_s=1e9)

    def most() -> int:
        """How many sequences it lets come."""
        return next(coming for coming in range(1000) if not host.has_room(coming=coming))

    assert most() == 125  # 100 run, a quarter more waits
    host._count(inside=60, sequences=60)
    assert most() == 65
    host._count(inside=5, sequences=40)  # five prompts of eight choices
    assert most() == 25
    host._count(inside=-5, sequences=-40)
    for _ in range(200):  # 20 a second for 10 s
        host._count(inside=1, sequences=1)
        host.count_done()
    clock += 10
    assert most() == 80  # 40 end in the two seconds that the next may take to come
    clock += 10
    assert most() == 65
    for _ in range(100_000):
        host._count(inside=1, sequences=1)
        host.count_done()
    clock += 1
    assert most() == 140, "as many wait as run, however many ended at once"
    clock += 1
    assert most() == 65


def test_room_is_for_what_the_kv_pool_lets_run() -> None:
    engine = EchoFrontend("m", pause_s=30)
    engine.max_running = 100
    host = EngineHost(lambda _: engine, stall_s=1e9)
    figures = {"running": 100, "waiting": 0}
    engine.stats = lambda: figures  # type: ignore[method-assign]  # figures of a moment, one after the other
    for running, waiting, room in ((20, 5, 125), (24, 5, 30), (16, 5, 30), (16, 0, 125), (16, 9, 125), (0, 9, 20)):
        figures = {"running": running, "waiting": waiting}
        assert host.stats() == figures
        assert host.has_room(coming=room - 1), figures
        assert not host.has_room(coming=room), figures
    engine.close()


def test_who_was_refused_is_told_of_room_once() -> None:
    engine = EchoFrontend("m", pause_s=30)
    engine.max_running = 8
    host = EngineHost(lambda _: engine, stall_s=1e9)
    rings: list[int] = []
    host.on_room = lambda: rings.append(host.prompts_inside)
    host._count(inside=12, sequences=12)
    host.count_done()
    assert rings == [], "nobody has asked"
    assert not host.has_room(coming=0)
    host.count_done()
    assert rings == []
    host.count_done()
    host.count_done()
    assert rings == [9]


def test_a_prompt_that_the_engine_does_not_take_takes_no_room() -> None:
    engine = EchoFrontend("m", pause_s=30)
    host = EngineHost(lambda _: engine, stall_s=1e9)
    message = SimpleNamespace(batch_id="b", is_raw=False, config_of=lambda index: GenerationConfig(n=1 + index))
    ledger = SimpleNamespace(verdict=None, add=lambda _: None, settle=lambda _: None)
    took, prompts = engine.submit, [(0, "one"), (1, "two"), (2, "three")]

    def submit(prompt: str, *args: Any, **kwargs: Any) -> int:
        if prompt == "two":
            raise EngineError
        return took(prompt, *args, **kwargs)

    with host.submit(prompts, message, ledger):  # type: ignore[arg-type]  # what it uses of both, and no database
        assert (host.prompts_inside, host._sequences) == (3, 6)
    assert (host.prompts_inside, host._sequences) == (0, 0), "what was inside was given up"
    engine.submit = submit  # type: ignore[method-assign,assignment]  # the engine takes no second prompt
    with pytest.raises(EngineError), host.submit(prompts, message, ledger):  # type: ignore[arg-type]  # as above
        pass
    assert (host.prompts_inside, host._sequences) == (0, 0)
    engine.close()


def test_an_engine_that_makes_steps_is_not_stuck_though_nothing_ends() -> None:
    engine = EchoFrontend("m", pause_s=30)
    host = EngineHost(lambda _: engine, stall_s=0.2)
    engine.submit("long", GenerationConfig(), lambda _: None)
    host._count(inside=1, sequences=1)
    for _ in range(30):
        engine._steps += 1
        time.sleep(0.02)
        assert host.trouble() is None
    wait_for(host.trouble, timeout_s=20, what="no more steps: stuck")
    engine.close()


def test_only_an_engine_that_is_given_up_is_lost() -> None:
    seen = []

    def load(on_event):
        seen.append(on_event)
        return EchoFrontend("m")

    host = EngineHost(load, stall_s=60)
    seen[0](EchoEvent("engine_died", "it will be started again"))
    assert host.trouble() is None
    seen[0](EchoEvent("engine_given_up", "24 deaths in a row"))
    assert host.trouble() == "24 deaths in a row"
    host.close()
