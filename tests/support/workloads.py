"""The jobs that benchmarks run: lengths and token ids drawn from fixed seeds, the same for every engine that is measured.

W1, W2, W3 and L1 are what other engines were measured with; checksums hold them to it. L (1,000 in, 1,000 out) and D (128 in,
2,048 out) are drawn in the same way and held to checksums of their own, so that they stay the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from typing import NamedTuple


class Job(NamedTuple):
    """One prompt and how many tokens follow it."""

    ids: tuple[int, ...]
    length: int


class Shape(NamedTuple):
    """Ranges of lengths, both ends included."""

    count: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    checksum: str


WORKLOADS = {
    "W1": Shape(1024, (64, 960), (64, 512), "25ac6a664c7e8154"),
    "W2": Shape(512, (128, 128), (512, 512), "d751bfd55cec5267"),
    "W3": Shape(256, (2048, 2048), (128, 128), "b21983e2c28486ed"),
    "L": Shape(1000, (1000, 1000), (1000, 1000), "3961df11f52aea8d"),
    "D": Shape(1000, (128, 128), (2048, 2048), "8f0a40caf314dc52"),
}
CHECKSUM_VOCABULARY = 128256
SEED = 1234
L1_LENGTH = 512


def draw_workload(name: str, vocab: int) -> list[Job]:
    """Draw a workload: all lengths first, then the ids, so that a share of the jobs is a prefix of the whole."""
    shape = WORKLOADS[name]
    draw = random.Random(f"{SEED}-{name}")
    lengths = [(draw.randint(*shape.prompt), draw.randint(*shape.output)) for _ in range(shape.count)]
    jobs = [Job(tuple(draw.randrange(3, vocab - 1) for _ in range(prompt)), output) for prompt, output in lengths]
    if vocab == CHECKSUM_VOCABULARY and checksum(jobs) != shape.checksum:
        raise ValueError(f"{name} isn't what other engines ran: its checksum is {checksum(jobs)}, not {shape.checksum}")
    return jobs


def checksum(jobs: Sequence[Job]) -> str:
    text = json.dumps([[list(job.ids), job.length] for job in jobs], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_warm_up(vocab: int, count: int, seed: int) -> list[Job]:
    """Output lengths are spread, so that the running batch shrinks through many sizes."""
    draw = random.Random(seed)
    return [
        Job(tuple(draw.randrange(3, vocab - 1) for _ in range(draw.randint(64, 960))), 2 + (index * 37) % 47)
        for index in range(count)
    ]


def draw_single(vocab: int) -> Job:
    """L1: one request, 128 in, 512 out."""
    draw = random.Random(7)
    return Job(tuple(draw.randrange(3, vocab - 1) for _ in range(128)), L1_LENGTH)


def draw_uneven(vocab: int, count: int, longest_prompt: int, longest_output: int) -> list[Job]:
    """Lengths as people's are: many short ones, few long ones (log-uniform from 16 and from 8 tokens)."""
    draw = random.Random(SEED)

    def length(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    return [
        Job(tuple(draw.randrange(3, vocab - 1) for _ in range(length(16, longest_prompt))), length(8, longest_output))
        for _ in range(count)
    ]
