"""Log records are events with fields, in text and in JSON, and an embedding program's logging stays its own."""

from __future__ import annotations

import io
import json
import logging

import pytest

from headrace.errors import InvalidRequest
from headrace.log import configure


def test_json_records() -> None:
    stream = io.StringIO()
    configure("INFO", style="json", stream=stream)
    log = logging.getLogger("worker.tasks")
    log.info("rows %d", 3, extra={"event": "batch_recorded", "rows": 3, "batch_id": "b1"})
    log.debug("nothing")
    try:
        int("broken")
    except ValueError:
        log.exception("failed")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first.pop("ts") > 0
    assert first == {
        "level": "INFO",
        "logger": "worker.tasks",
        "event": "batch_recorded",
        "message": "rows 3",
        "rows": 3,
        "batch_id": "b1",
    }
    assert "ValueError: invalid literal" in second["exception"]


def test_text_records_and_reconfiguring() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("DEBUG", stream=first)
    configure("WARNING", stream=second)
    logging.getLogger("engine.rank").warning("it died", extra={"event": "engine_died", "deaths": 2})
    logging.getLogger("engine.rank").info("unseen")
    assert first.getvalue() == ""
    line = second.getvalue()
    assert line.count("\n") == 1
    assert line.endswith("WARNING engine.rank [engine_died] it died (deaths=2)\n")


def test_other_loggers_are_left_alone() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    configure("DEBUG", stream=io.StringIO())
    assert (root.level, root.handlers) == before


def test_unknown_level() -> None:
    with pytest.raises(InvalidRequest, match="LOUD"):
        configure("LOUD")
