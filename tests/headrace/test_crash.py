"""The points at which tests let a process die."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.crash import CRASH_POINTS, check_crash_at
from headrace.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[2]


def test_every_point_is_in_the_code_once() -> None:
    sources = "\n".join(path.read_text() for room in ("headrace", "worker") for path in (ROOT / room).rglob("*.py"))
    assert sorted(re.findall(r'crash_point\("(\w+)"\)', sources)) == sorted(CRASH_POINTS)


@pytest.mark.parametrize("text", ["nowhere", "mid_finalize:", "mid_finalize:0", "mid_finalize:x", ":1"])
def test_what_is_no_point_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match="HEADRACE_CRASH_AT"):
        check_crash_at(text)


@pytest.mark.parametrize(("armed", "passed"), [("", 5), ("mid_flush", 1), ("mid_flush:3", 3), ("after_claim", 5)])
def test_a_process_dies_at_its_passage_and_only_there(armed: str, passed: int) -> None:
    script = f"from headrace.crash import arm, crash_point\narm({armed!r})\nfor _ in range(5): print('.', flush=True); crash_point('mid_flush')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.count(".") == passed
    assert done.returncode == (0 if passed == 5 else -signal.SIGKILL)
