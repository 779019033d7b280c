"""Timing a run, and the line that is left of it. Knows no engine."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ledger
import torch


class Took(NamedTuple):
    """Seconds of one run."""

    wall: float
    cpu: float
    """Of all threads: on a machine that others use too, the steadier of the two."""


def timed(run: Callable[[], list[list[int]]]) -> tuple[list[list[int]], Took]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    answers = run()
    return answers, Took(time.perf_counter() - wall, time.process_time() - cpu)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def record(arguments: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Print and append one line."""
    cuda = arguments.device == "cuda"
    line = {
        "benchmark": "engine",
        "engine": "headrace",
        **fields,
        "gpu" if cuda else "cpu": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:]),
    }
    ledger.keep(arguments.out, line, at_commit=arguments.commit)
