"""The paged KV pool of one rank: how many blocks there are, and the tensors that hold them.

Layout: for each layer keys and values apart, [B, K, S, H] = (block, KV head, position in the block, head dim), contiguous. Where they are
8-bit integers, values are [B, K, S / 4, H, 4], and beside both are their scales, [B, K, S] in float32.
Who owns which block is the scheduler's business, not known here.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.models.decoder import LayerCache
from engine.models.spec import ModelSpec
from engine.options import EngineOptions
from headrace.errors import InvalidRequest, KVCapacity
from kernels.attention import UNPACKED_POSITIONS, KVScales

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # a cache line, and the widest vector
CPU_POOL_BYTES = 2 << 30
"""Most that a pool takes of a CPU host unasked; `num_gpu_blocks` asks for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Where one rank's memory goes, in bytes; JSON-ready by `dataclasses.asdict`."""

    weights: int
    activations: int
    """On a GPU measured, and what an int8 pool's pages take when they are unpacked; 0 on a CPU, where it isn't known."""
    requests: int
    """The token ids and block tables of `max_batch_size` running requests."""
    kv_pool: int
    kv_block: int
    num_blocks: int
    free_before_pool: int
    graphs: int = 0
    """What capturing the decode graphs took, measured behind the pool; 0 where there are none."""


def block_bytes(spec: ModelSpec, *, block_size: int, dtype: torch.dtype, int8: bool = False) -> int:
    """Bytes of one block over all layers of this rank (`spec` is the rank's share)."""
    position = spec.head_dim + torch.float32.itemsize if int8 else spec.head_dim * dtype.itemsize
    return 2 * spec.num_layers * spec.num_kv_heads * block_size * position


def unpacked_bytes(spec: ModelSpec, options: EngineOptions, *, dtype: torch.dtype) -> int:
    """Bytes that a GPU needs at most to attend to prompts from an int8 pool: one layer's keys and values in `dtype`."""
    if not options.int8_kv:
        return 0
    positions = max(UNPACKED_POSITIONS, options.session_len + options.block_size)
    return 2 * positions * spec.num_kv_heads * spec.head_dim * dtype.itemsize


def left_by_requests(options: EngineOptions, *, requests: int, free: int) -> int:
    """Bytes of `free` that are left beside the `requests` bytes of running requests' own tables; `InvalidRequest` where none are."""
    if requests >= free:
        raise InvalidRequest(
            f"max_batch_size={options.max_batch_size} requests of session_len={options.session_len} tokens need {_gib(requests)} for "
            f"their token ids and block tables, but {_gib(free)} are free; lower max_batch_size or session_len",
            param="max_batch_size",
        )
    return free - requests


def choose_num_blocks(options: EngineOptions, *, one_block: int, free: int) -> int:
    """Settle how many blocks of `one_block` bytes fit into `free` bytes of memory.

    An explicit `num_blocks` that doesn't fit raises `InvalidRequest` before anything is allocated; so does memory that
    holds no block at all (`KVCapacity`).
    """
    if options.num_blocks:
        if options.num_blocks * one_block > free:
            raise InvalidRequest(
                f"num_gpu_blocks={options.num_blocks} of {one_block} bytes need {_gib(options.num_blocks * one_block)}, "
                f"but {_gib(free)} are free; at most {free // one_block} fit",
                param="num_gpu_blocks",
            )
        _warn_if_small(options, options.num_blocks)
        return options.num_blocks
    allowed = int(free * options.cache_max_entry_count)
    if options.device == "cpu":
        # One whole session always gets room, so that the longest allowed prompt can run at all.
        allowed = min(allowed, max(CPU_POOL_BYTES, options.max_blocks_per_sequence * one_block))
    count = min(allowed // one_block, options.max_batch_size * options.max_blocks_per_sequence)
    if count < 1:
        raise KVCapacity(
            f"{_gib(free)} of free memory hold no KV block of {one_block} bytes ({options.block_size} tokens); use a smaller model, "
            "more memory or a smaller block_size",
            param="block_size",
        )
    _warn_if_small(options, count)
    return count


def _warn_if_small(options: EngineOptions, num_blocks: int) -> None:
    if num_blocks < options.max_blocks_per_sequence:
        log.warning(
            "the KV pool of %d blocks of %d tokens is smaller than one session of %d tokens; longer prompts are refused, and answers end "
            "where it is full",
            num_blocks,
            options.block_size,
            options.session_len,
            extra={"event": "kv_pool_small", "num_blocks": num_blocks, "session_blocks": options.max_blocks_per_sequence},
        )


def allocate(
    spec: ModelSpec,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_layers: int | None = None,
    int8: bool = False,
) -> tuple[LayerCache, ...]:
    """Allocate keys and values of every layer, or of `num_layers`, in `dtype` or as int8 with scales.

    Zeros: an unwritten NaN would survive a multiplication by a masked weight of 0.
    """
    places = (num_blocks, spec.num_kv_heads, block_size)

    def layer() -> LayerCache:
        k_BKSH, v_BKSH = (_zeros((*places, spec.head_dim), torch.int8 if int8 else dtype, device) for _ in range(2))
        if not int8:
            return LayerCache(k_BKSH, v_BKSH)
        scales = KVScales(*(_zeros(places, torch.float32, device) for _ in range(2)))
        return LayerCache(k_BKSH, v_BKSH.view(num_blocks, spec.num_kv_heads, -1, spec.head_dim, 4), scales)

    return tuple(layer() for _ in range(num_layers or spec.num_layers))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros; on a CPU memory that the kernel gives page by page when it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page: a pool of 2 GiB would cost a second at the start and stay resident, used or not.
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + _ALIGNMENT, dtype=np.uint8))
    start = -raw.data_ptr() % _ALIGNMENT
    return raw[start : start + size].view(dtype).view(shape)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on a GPU what the driver says; on a host RAM, or less where a cgroup limits it."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_ram(), _cgroup_headroom())


def report(memory: MemoryReport) -> dict[str, Any]:
    """Give the report as a dict with readable sizes beside the bytes."""
    fields = {name: getattr(memory, name) for name in memory.__dataclass_fields__}
    return {**fields, "text": f"weights {_gib(memory.weights)}, KV pool {_gib(memory.kv_pool)} in {memory.num_blocks} blocks"}


def _available_ram() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return CPU_POOL_BYTES


def _cgroup_headroom() -> int:
    """Memory that the container may still take (cgroup v2); page cache counts as free, since the kernel gives it back."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return 1 << 62
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        used = int((root / "memory.current").read_text(encoding="ascii")) - int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62  # no cgroup v2 here: what the host has free decides alone
    return max(0, int(limit) - used)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
