"""Keys and values that lie in the cache as 8-bit integers: how a kernel reads a tile of them, and how whole pages are unpacked.

Decoding reads every page once and is limited by memory, so its kernel widens the integers itself, in registers. The tensor cores of prefill
take their operands from shared memory and every page is read by many programs: there pages are unpacked first, once a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.attention import UNPACKED_POSITIONS
from kernels.gpu.paging import tile_slots
from kernels.gpu.quick_launch import ceil_div, power_of_2, quick

if TYPE_CHECKING:
    from kernels.attention import AttentionMetadata, KVScales

_ASSEMBLY = tl.constexpr(not knobs.runtime.interpret)
"""The interpreter knows no assembly."""


@triton.jit
def load_values(
    p_v_cache, p_table, i_page, i_tile, i_head, context, K,
    S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load a tile of values as [H_PAD, TILE]; they lie in the cache as [S / 4, H, 4]: four positions of a dimension are one word."""
    o_w = tl.arange(0, TILE // 4)
    o_h4 = tl.arange(0, H_PAD * 4)
    o_v = tile_slots(p_table, i_page, i_tile, i_head, context, K, S, TILE, True, 4)[:, None] * H + o_h4[None, :]
    # Whole words: what else stands in the last one gets a weight of zero.
    b_v = tl.load(p_v_cache + o_v, mask=(i_tile * TILE + o_w * 4 < context)[:, None] & (o_h4 < H * 4)[None, :], other=0)
    return tl.reshape(tl.permute(tl.reshape(b_v, (TILE // 4, H_PAD, 4)), (1, 0, 2)), (H_PAD, TILE))


@triton.jit
def widened(b_x):
    """Give int8 numbers in float16, four at a time: 1024 + (x + 128) is a float16 with x + 128 as its last byte.

    Products with them are made in float16, whatever the queries' type: it has three binary digits more than the numbers, and no other is
    made of them as quickly.
    """
    if not _ASSEMBLY:
        return b_x.to(tl.float16)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 biased, middle;
        mov.b32 middle, 0x64806480;
        xor.b32 biased, $2, 0x80808080;
        prmt.b32 $0, biased, 0x64646464, 0x4140;
        prmt.b32 $1, biased, 0x64646464, 0x4342;
        sub.f16x2 $0, $0, middle;
        sub.f16x2 $1, $1, middle;
        }
        """,
        "=r,=r,r", [b_x], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip


@quick
@triton.jit
def _unpack_kernel(
    p_k_cache, p_v_cache, p_k_scales, p_v_scales, p_pages, p_k, p_v,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_to = (tl.program_id(0).to(tl.int64) * K + tl.program_id(1)) * S
    i_from = (tl.load(p_pages + tl.program_id(0)).to(tl.int64) * K + tl.program_id(1)) * S
    o_h = tl.arange(0, H_PAD)
    o_h4 = tl.arange(0, H_PAD * 4)
    for start in range(0, S, TILE):
        o_s = start + tl.arange(0, TILE)
        m_sh = (o_s < S)[:, None] & (o_h < H)[None, :]
        b_k = tl.load(p_k_cache + (i_from + o_s)[:, None] * H + o_h[None, :], mask=m_sh, other=0).to(tl.float32)
        b_k *= tl.load(p_k_scales + i_from + o_s)[:, None]
        tl.store(p_k + (i_to + o_s)[:, None] * H + o_h[None, :], b_k.to(p_k.dtype.element_ty), mask=m_sh)
        o_w = start + tl.arange(0, TILE // 4) * 4
        b_v = tl.load(p_v_cache + (i_from + o_w)[:, None] * H + o_h4[None, :], mask=(o_h4 < H * 4)[None, :], other=0)
        b_v = tl.reshape(tl.permute(tl.reshape(b_v, (TILE // 4, H_PAD, 4)), (0, 2, 1)), (TILE, H_PAD)).to(tl.float32)
        b_v *= tl.load(p_v_scales + i_from + o_s)[:, None]
        tl.store(p_v + (i_to + o_s)[:, None] * H + o_h[None, :], b_v.to(p_v.dtype.element_ty), mask=m_sh)


class UnpackedRows(NamedTuple):
    """Neighbouring rows of many tokens whose pages are unpacked together."""

    rows: range
    pages: Tensor
    """int32 [pages]: where each page comes from."""
    tables_RP: Tensor
    """int32: the step's block tables, of pages counted from the first unpacked one; only these rows' mean anything."""


def plan_unpacking(metadata: AttentionMetadata, block_size: int) -> Iterator[UnpackedRows]:
    """Say how the pages of a step's rows of many tokens are unpacked: once a step, for all its layers."""
    if metadata.num_single == len(metadata.context_lens_R):
        return  # nor may a step that is captured ask the device for lengths
    lens = metadata.host_context_lens or tuple(metadata.context_lens_R.tolist())
    tables_RP = metadata.block_tables_RP
    pages_R = (metadata.context_lens_R + (block_size - 1)) // block_size
    before_R = pages_R.cumsum(0, dtype=torch.int32) - pages_R
    within_P = torch.arange(tables_RP.shape[1], dtype=torch.int32, device=tables_RP.device)
    row = metadata.num_single
    while row < len(lens):
        counts = _that_fit([ceil_div(length, block_size) for length in lens[row:]], UNPACKED_POSITIONS // block_size)
        rows, total = range(row, row + len(counts)), sum(counts)
        first_R = before_R - before_R[row]
        rows_N = torch.arange(rows.start, rows.stop, device=tables_RP.device)
        row_T = torch.repeat_interleave(rows_N, pages_R[row : rows.stop], output_size=total)
        index_T = torch.arange(total, device=tables_RP.device) - first_R[row_T]
        yield UnpackedRows(rows, tables_RP[row_T, index_T], first_R[:, None] + within_P)
        row = rows.stop


def _that_fit(counts: Sequence[int], room: int) -> list[int]:
    """Give the leading counts whose sum doesn't exceed `room`, at least one."""
    total = 0
    taken: list[int] = []
    for count in counts:
        total += count
        if taken and total > room:
            break
        taken.append(count)
    return taken


def unpack(
    k_cache_BKSH: Tensor, v_cache_BKSH: Tensor, scales: KVScales, pages: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Give keys and values of these pages, [pages, K, S, H] in `dtype`."""
    num_kv_heads, size, head_dim = k_cache_BKSH.shape[1:]
    k, v = torch.empty((2, len(pages), num_kv_heads, size, head_dim), dtype=dtype, device=pages.device)
    if len(pages):
        _unpack_kernel[(len(pages), num_kv_heads)](
            k_cache_BKSH,
            v_cache_BKSH,
            *scales,
            pages,
            k,
            v,
            K=num_kv_heads,
            S=size,
            H=head_dim,
            H_PAD=power_of_2(head_dim),
            TILE=min(size, 32),
            num_warps=4,
        )
    return k, v
