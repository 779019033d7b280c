"""One engine process for the whole checklist: points that need another say so themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pipelines import SMALL

from engine.async_engine import AsyncEngine
from engine.supervisor import EngineEvent
from engine.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def events() -> list[EngineEvent]:
    """What the pipe's supervisor tells of its engine."""
    return []


@pytest.fixture(scope="session")
def pipe(tiny_model_dir: Path, events: list[EngineEvent]) -> Iterator[AsyncEngine]:
    """`pipeline()`'s own object, with an ear for events: tiny model, CPU, 16 sequences at once, 256 blocks of 16."""
    with AsyncEngine(str(tiny_model_dir), backend_config=SMALL, on_event=events.append) as made:
        yield made


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    """The tiny model's."""
    return Tokenizer(tiny_model_dir)
