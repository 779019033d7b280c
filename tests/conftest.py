"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: spinning OpenMP threads on a busy two-core machine make everything up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random llama with a chat template, as a Hugging Face directory."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
