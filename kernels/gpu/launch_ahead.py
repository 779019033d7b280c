"""Programmatic dependent launch: a kernel's programs start, and fetch what no kernel writes, before the kernel ahead of it ends.

What makes a chain of such kernels on one stream safe:

- `wait` stands before the first read of what a kernel may have written and before the first write of anything. It returns when the
  kernel ahead is complete and its writes are seen. Every program calls it, so a kernel that is complete has waited for the one
  ahead of it, and what holds for one link holds for the chain. Before it only weights are read.
- `release` lets the next kernel's programs start once every program of this one has called it or ended. It says nothing about
  data. At the top of a kernel it suits many short programs; where each multiprocessor gets one long program it stands behind
  the loop: the next kernel's programs would settle where there is room, which is not evenly.

A kernel launched without `PDL` waits for all kernels ahead, as ever. Below compute capability 9.0 none of this exists.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@cache
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def options(device: torch.device) -> dict[str, Any]:
    """Give what a launch on `device` passes besides its arguments: the kernel's `PDL` and, where that is true, Triton's option."""
    return {"PDL": True, "launch_pdl": True} if _supported(device) else {"PDL": False}


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel's programs start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel ahead."""
    if PDL:
        tl.extra.cuda.gdc_wait()
