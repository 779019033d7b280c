"""Structured logging: every record is a message for the operator and, in `extra`, an `event` name with its fields.

    log.warning("The engine died; it is started again.", extra={"event": "engine_died", "deaths": 1})

This module doesn't know which events exist; docs/ lists them. It touches only the loggers of headrace's own rooms, so a
program that embeds `pipeline()` keeps its own logging as it was.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import IO, Any, Literal

from headrace.errors import InvalidRequest

ROOMS = ("headrace", "engine", "kernels", "worker", "api")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "event", "color_message"}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return what `extra` added to a record, without its event."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """One line: time, level, logger, event, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        event = getattr(record, "event", None)
        fields = " ".join(f"{name}={value!r}" for name, value in fields_of(record).items())
        line = f"{stamp} {record.levelname} {record.name}{f' [{event}]' if event else ''} {record.getMessage()}"
        line += f" ({fields})" if fields else ""
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (Unix seconds), level, logger, event, message, exception, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        row: dict[str, Any] = {"ts": round(record.created, 3), "level": record.levelname, "logger": record.name}
        row["event"] = getattr(record, "event", None)
        row["message"] = record.getMessage()
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps({**fields_of(record), **row}, default=str, ensure_ascii=False)


class _StderrHandler(logging.StreamHandler[Any]):
    """Looks `sys.stderr` up for each record: a notebook, a test or a daemon may have replaced it since."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(stream or sys.stderr)
        self._fixed = stream is not None

    def emit(self, record: logging.LogRecord) -> None:
        if not self._fixed:
            self.stream = sys.stderr
        super().emit(record)


def check_level(level: str) -> str:
    """Return a level's name in capitals; raise `InvalidRequest` for one that doesn't exist."""
    name = level.upper() if isinstance(level, str) else level
    if name not in LEVELS:
        raise InvalidRequest(f"log_level must be one of {', '.join(LEVELS)}, not {level!r}", param="log_level")
    return name


def configure(level: str = "INFO", *, style: Literal["text", "json"] = "text", stream: IO[str] | None = None) -> None:
    """Send the rooms' records from `level` on to `stream` (None: stderr). Call it again to change either.

    Where the root logger already has handlers (an application, a test), the records go there instead.
    """
    formatter: logging.Formatter = JsonFormatter() if style == "json" else TextFormatter()
    embedded = bool(logging.getLogger().handlers) and stream is None
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.setLevel(check_level(level))
        for handler in [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]:
            logger.removeHandler(handler)
        logger.propagate = embedded
        if not embedded:
            handler = _StderrHandler(stream)
            handler.setFormatter(formatter)
            logger.addHandler(handler)
