"""docker-compose.yml against the part of the Compose specification that it uses, and against the commands that other tests run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from headrace import stack
from headrace.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
DURATION = {"type": "string", "pattern": r"^(\d+(us|ms|s|m|h))+$"}
WORDS = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


HEALTHCHECK = closed(
    {
        "test": WORDS,
        "interval": DURATION,
        "timeout": DURATION,
        "retries": {"type": "integer", "minimum": 1},
        "start_period": DURATION,
    },
    "test",
)
DEVICE = closed({"driver": {"type": "string"}, "count": {"type": ["integer", "string"]}, "capabilities": WORDS}, "capabilities")
SERVICE = closed(
    {
        "build": {"type": "string"},
        "image": {"type": "string"},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "command": WORDS,
        "environment": {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
        "volumes": {"type": "array", "items": {"type": "string", "pattern": r"^[a-z]+:/\S+$"}},
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
        "ipc": {"enum": ["host", "private", "shareable"]},
        "stop_grace_period": DURATION,
        "depends_on": {
            "type": "object",
            "additionalProperties": closed(
                {"condition": {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}}, "condition"
            ),
        },
        "deploy": closed({"resources": closed({"reservations": closed({"devices": {"type": "array", "items": DEVICE}})})}),
        "healthcheck": HEALTHCHECK,
    },
    "image",
)
COMPOSE = {
    **closed(
        {
            "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
            "services": {"type": "object", "additionalProperties": SERVICE},
            "volumes": {"type": "object", "additionalProperties": {"type": ["object", "null"]}},
        },
        "services",
    ),
    "patternProperties": {"^x-": {}},
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


def test_it_is_a_compose_file(compose: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(COMPOSE)
    jsonschema.validate(compose, COMPOSE)


def test_the_schema_refuses_what_compose_refuses(compose: dict[str, Any]) -> None:
    broken = {**compose, "services": {**compose["services"], "api": {"image": "headrace", "healthchek": {}}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, COMPOSE)


def test_it_has_the_services_and_each_is_watched(services: dict[str, Any]) -> None:
    assert set(services) == {"redis", "postgres", "migrate", "api", "worker", "flower"}
    assert {name for name, service in services.items() if "healthcheck" not in service} == {"migrate"}


def test_dependencies_exist_and_conditions_can_come_true(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, needs in service.get("depends_on", {}).items():
            if needs["condition"] == "service_healthy":
                assert "healthcheck" in services[name]
            else:
                assert services[name]["restart"] == "no"


def test_volumes_are_declared(compose: dict[str, Any]) -> None:
    used = {volume.partition(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    assert used == set(compose["volumes"])


def test_every_command_is_one_that_the_stack_runs(services: dict[str, Any]) -> None:
    """tests/headrace/test_stack.py starts the very commands that are built here."""
    settings = Settings()
    assert services["worker"]["command"] == ["python", *stack.worker_arguments(settings)]
    assert services["api"]["command"] == ["python", *stack.api_arguments(host="0.0.0.0", port=8000)]
    assert services["flower"]["command"] == ["python", *stack.flower_arguments(address="0.0.0.0", port=5555)]
    assert services["migrate"]["command"] == ["python", *stack.MIGRATE_ARGUMENTS]
    assert services["redis"]["command"][1:] == list(stack.REDIS_ARGUMENTS)


def test_the_settings_in_it_exist(services: dict[str, Any]) -> None:
    for service in services.values():
        given = service.get("environment", {})
        Settings.from_environ({name: str(value) for name, value in given.items() if name.startswith("HEADRACE_")})


def test_flower_lets_nobody_in_who_is_not_named(services: dict[str, Any]) -> None:
    """Empty, as it is where nobody set it, is a login that no request can have: tests/integration/test_flower.py tries."""
    assert services["flower"]["environment"]["FLOWER_BASIC_AUTH"] == "${FLOWER_BASIC_AUTH:-}"
    assert services["flower"]["ports"] == ["127.0.0.1:5555:5555"]


def test_the_worker_gets_a_gpu_and_time_to_drain(services: dict[str, Any]) -> None:
    worker = services["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert "gpu" in device["capabilities"]
    assert int(worker["stop_grace_period"].removesuffix("s")) > Settings().drain_timeout_s


def test_the_image_copies_what_it_installs() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for source in re.findall(r"^COPY (?!\. )(.+?) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
    assert not re.search(r"^USER root", text, re.MULTILINE)
    assert re.search(r"^USER \w+", text, re.MULTILINE)
