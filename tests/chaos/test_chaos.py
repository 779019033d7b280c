"""Nothing lost, nothing twice: the short form of the storm. The long one is `python tests/chaos/run.py --faults 200 --prompts 20000`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from chaos import Storm


@pytest.mark.slow
@pytest.mark.parametrize(("database", "faults"), [("postgres", 13), ("sqlite", 5)])
def test_every_prompt_is_answered_once_whatever_falls(database: str, faults: int, tmp_path: Path) -> None:
    """A failure prints its seed; the same command with `--seed` lets the same faults fall."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o711)  # PostgreSQL may run as another user
    prompts = 110 * faults
    with Storm(tmp_path, seed=seed, database=database, workers=2, pause_s=0.4) as storm:
        counts = storm.run(prompts=prompts, faults=faults, batch_size=prompts // 5, gap_s=0.8)
    print(json.dumps(counts))
    assert counts["faults"] == faults
    assert counts["rows"] == prompts
