"""The engine's seat in the worker: which class is loaded, and what is refused before it is."""

from __future__ import annotations

import dataclasses
import time

import pytest
from echo_frontend import EchoEvent, EchoFrontend
from worker_process import wait_for

from headrace.config import GenerationConfig, PytorchEngineConfig
from headrace.errors import InvalidRequest, ModelLoadError
from headrace.settings import Settings
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


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelLoadError):
        load_frontend(dataclasses.replace(ECHO, model="no-such-model"), lambda _: None)


def test_a_batch_size_that_nobody_gave_goes_by_the_device() -> None:
    for given, expected in (("{}", None), ('{"max_batch_size": 128}', 128)):
        frontend = load_frontend(dataclasses.replace(ECHO, engine_config=given), lambda _: None)
        assert frontend.backend_config.max_batch_size is expected  # type: ignore[attr-defined]
        frontend.close()


def test_room_is_for_what_runs_and_for_what_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    engine = EchoFrontend("m", pause_s=30)
    engine.max_running = 100
    host = EngineHost(lambda _: engine, stall_s=1e9)

    def most() -> int:
        """How many chunks of ten it takes, those that are here and those that are on their way."""
        return next(chunks for chunks in range(1000) if not host.has_room(chunks=chunks, chunk_size=10))

    assert most() == 13  # 100 run, a quarter more waits
    host._count(inside=60, chunks=6)
    assert most() == 6 + 7
    for _ in range(200):  # 20 a second for 10 s
        host._count(inside=1)
        host.count_done()
    clock += 10
    assert most() == 6 + 8  # 40 end in the two seconds that the next may take to come
    clock += 10
    assert most() == 6 + 7
    engine.close()


def test_an_engine_that_makes_steps_is_not_stuck_though_nothing_ends() -> None:
    engine = EchoFrontend("m", pause_s=30)
    host = EngineHost(lambda _: engine, stall_s=0.2)
    engine.submit("long", GenerationConfig(), lambda _: None)
    host._count(inside=1)
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
