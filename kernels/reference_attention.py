"""Paged attention in plain PyTorch, quick enough to serve from a CPU.

Rows of one token are computed together: rows of similar context are gathered from the cache into one dense tensor and
attended to by one batched call, with no loop over rows. Rows of many tokens are attended to one by one.

Grouped queries never copy the cache's heads: the group's query heads stand where a dense attention has query positions.
R rows, L padded context, G query heads of a kv head; the rest as in `kernels.attention`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import by_position, dequantise

if TYPE_CHECKING:
    from kernels.attention import AttentionMetadata, KVScales

# Elements of K that one gather may make: larger ones fall out of the cache between the gather and its use.
_GATHER_ELEMENTS = 1 << 19
# Positions that are gathered as one piece: whole pages of 64 would gather, hide and attend to 30 needless positions a row.
_PIECE = 16
# A row joins a group while it fills at least this share of the group's padded context.
_MIN_FILL = 0.75


class _Group(NamedTuple):
    """Rows of one token that are computed together."""

    rows_R: Tensor
    pieces_RKC: Tensor
    """Row of the cache seen as [B * K * S / piece, piece, H] for each row, kv head and piece of its context."""
    visible_RL: Tensor
    """Which gathered positions a row's token sees."""
    hidden_rows: Tensor
    hidden_positions: Tensor
    """Coordinates of the gathered positions past a context: whatever memory holds there must not reach a sum."""


class _Layout(NamedTuple):
    """What a step's metadata means on the host; the same for every layer of the step."""

    key: tuple[object, ...]
    groups: tuple[_Group, ...]
    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...]


class _LastLayout:
    """Holds the layout of the step in hand.

    A step's layers ask for the same one; deriving it anew for each would cost more than a small model's attention.
    """

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    def get(self, metadata: AttentionMetadata, key: tuple[object, ...], num_kv_heads: int, size: int) -> _Layout:
        """Give the layout for `metadata`: the last call's if it was for the same step (the very same host tuple)."""
        layout = self._layout
        if (
            layout is not None
            and metadata.host_context_lens is not None
            and layout.key[0] is metadata.host_context_lens
            and layout.key[1] is metadata.block_tables_RP
            and layout.key[2:] == key[2:]
        ):
            return layout
        layout = _lay_out(metadata, key, num_kv_heads, size)
        self._layout = layout
        return layout


_last_layout = _LastLayout()


def paged_attention(
    q_TNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    scales: KVScales | None = None,
) -> Tensor:
    """See `kernels.attention.paged_attention`."""
    k_scales_BKS, v_scales_BKS = scales or (None, None)
    num_kv_heads, size = k_cache_BKSH.shape[1:3]
    key = (metadata.host_context_lens, metadata.block_tables_RP, metadata.num_single, num_kv_heads, size, sliding_window)
    layout = _last_layout.get(metadata, key, num_kv_heads, size)
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    for group in layout.groups:
        _attend_singles(
            out_TNH,
            q_TNH,
            _gather(k_cache_BKSH, k_scales_BKS, group, q_TNH),
            _gather(v_cache_BKSH, v_scales_BKS, group, q_TNH),
            group,
            scale,
        )
    start = metadata.num_single
    for row in range(metadata.num_single, len(layout.context_lens)):
        length, context = layout.query_lens[row], layout.context_lens[row]
        if length and context:
            pages_P = metadata.block_tables_RP[row, : -(-context // size)].long()
            k_KCH = _of_row(k_cache_BKSH, k_scales_BKS, pages_P, context, q_TNH.dtype)
            v_KCH = _of_row(v_cache_BKSH, v_scales_BKS, pages_P, context, q_TNH.dtype)
            q_QNH = q_TNH[start : start + length]
            out_TNH[start : start + length] = _attend_row(q_QNH, k_KCH, v_KCH, scale, sliding_window)
        start += length
    return out_TNH


def _lay_out(metadata: AttentionMetadata, key: tuple[object, ...], num_kv_heads: int, size: int) -> _Layout:
    """Read the metadata on the host and sort the single-token rows into groups of similar context."""
    context_lens = metadata.host_context_lens
    if context_lens is None:
        context_lens = tuple(metadata.context_lens_R.tolist())
    query_lens = metadata.query_lens
    if query_lens is None:
        query_lens = tuple(metadata.query_start_R1.diff().tolist())
    window = key[5]
    rows = sorted((r for r in range(metadata.num_single) if context_lens[r]), key=lambda r: context_lens[r])
    groups = []
    while rows:
        longest = context_lens[rows[-1]]
        most = max(1, _GATHER_ELEMENTS // (longest * num_kv_heads * 64))
        count = 1
        while count < min(most, len(rows)) and context_lens[rows[-count - 1]] >= _MIN_FILL * longest - size:
            count += 1
        members, rows = rows[-count:], rows[:-count]
        lens_R = torch.tensor([context_lens[r] for r in members])
        groups.append(_group(metadata, members, lens_R, num_kv_heads, size, window if isinstance(window, int) else None))
    return _Layout(key, tuple(groups), context_lens, query_lens)


def _group(
    metadata: AttentionMetadata, rows: list[int], lens_R: Tensor, num_kv_heads: int, size: int, window: int | None
) -> _Group:
    """Index tensors for rows that share one gather."""
    rows_R = torch.tensor(rows)
    piece = math.gcd(size, _PIECE)
    start_C = torch.arange(0, int(lens_R[-1]), piece)
    pages_RC = metadata.block_tables_RP[rows_R].index_select(1, start_C // size).long()
    # A shorter row's table may hold anything past its last page: those gathers read page 0 and are hidden.
    pages_RC = pages_RC.masked_fill(start_C >= lens_R[:, None], 0)
    heads_RKC = pages_RC[:, None, :] * num_kv_heads + torch.arange(num_kv_heads)[None, :, None]
    pieces_RKC = heads_RKC * (size // piece) + start_C % size // piece
    position_L = torch.arange(len(start_C) * piece)
    past_RL = position_L >= lens_R[:, None]
    visible_RL = ~past_RL
    if window is not None:
        visible_RL &= position_L >= lens_R[:, None] - window
    hidden_rows, hidden_positions = past_RL.nonzero(as_tuple=True)
    return _Group(rows_R, pieces_RKC, visible_RL, hidden_rows, hidden_positions)


def _gather(cache_BKSH: Tensor, scales_BKS: Tensor | None, group: _Group, q_TNH: Tensor) -> Tensor:
    """Give the keys or values of a group's rows, [R, K, L, H]; zeros past a row's context."""
    head_dim = q_TNH.shape[-1]
    num_rows, num_kv_heads, num_pieces = group.pieces_RKC.shape
    pieces = group.pieces_RKC.flatten()
    piece = group.visible_RL.shape[1] // num_pieces
    shape = (num_rows, num_kv_heads, num_pieces * piece)
    x = cache_BKSH.view(-1, piece * head_dim).index_select(0, pieces)
    if cache_BKSH.dim() == 5:
        x = by_position(x.view(-1, piece // 4, head_dim, 4))
    x_RKLH = x.reshape(*shape, head_dim)
    if scales_BKS is not None:
        x_RKLH = dequantise(x_RKLH, scales_BKS.view(-1, piece).index_select(0, pieces).view(shape), q_TNH.dtype)
    if group.hidden_rows.numel():
        x_RKLH[group.hidden_rows, :, group.hidden_positions] = 0
    return x_RKLH


def _of_row(cache_BKSH: Tensor, scales_BKS: Tensor | None, pages_P: Tensor, context: int, dtype: torch.dtype) -> Tensor:
    """Give the keys or values of one row, [K, C, H]."""
    x_PKSH = cache_BKSH[pages_P] if cache_BKSH.dim() == 4 else by_position(cache_BKSH[pages_P])
    x_KCH = x_PKSH.transpose(0, 1).flatten(1, 2)[:, :context]
    if scales_BKS is None:
        return x_KCH
    return dequantise(x_KCH, scales_BKS[pages_P].transpose(0, 1).flatten(1, 2)[:, :context], dtype)


def _attend_singles(out_TNH: Tensor, q_TNH: Tensor, k_RKLH: Tensor, v_RKLH: Tensor, group: _Group, scale: float) -> None:
    """One token each for the rows of a group, into `out_TNH`."""
    num_rows, num_kv_heads, _, head_dim = k_RKLH.shape
    q_RKGH = q_TNH[group.rows_R].view(num_rows, num_kv_heads, -1, head_dim)
    mask_R11L = group.visible_RL[:, None, None, :]
    out_RKGH = F.scaled_dot_product_attention(q_RKGH, k_RKLH, v_RKLH, attn_mask=mask_R11L, scale=scale)
    out_TNH[group.rows_R] = out_RKGH.reshape(num_rows, -1, head_dim)


def _attend_row(q_QNH: Tensor, k_KCH: Tensor, v_KCH: Tensor, scale: float, window: int | None) -> Tensor:
    """Many tokens of one row. The group of query heads is a batch dimension over which K and V are expanded, not copied."""
    length, num_heads, head_dim = q_QNH.shape
    num_kv_heads, context = k_KCH.shape[:2]
    group = num_heads // num_kv_heads
    q_KGQH = q_QNH.view(length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    k_KGCH = k_KCH[:, None].expand(num_kv_heads, group, context, head_dim)
    v_KGCH = v_KCH[:, None].expand(num_kv_heads, group, context, head_dim)
    if length == context and (window is None or window >= context):
        out_KGQH = F.scaled_dot_product_attention(q_KGQH, k_KGCH, v_KGCH, is_causal=True, scale=scale)
    else:
        query_Q1 = torch.arange(context - length, context)[:, None]
        key_C = torch.arange(context)
        visible_QC = key_C <= query_Q1
        if window is not None:
            visible_QC &= key_C > query_Q1 - window
        out_KGQH = F.scaled_dot_product_attention(q_KGQH, k_KGCH, v_KGCH, attn_mask=visible_QC, scale=scale)
    return out_KGQH.permute(2, 0, 1, 3).reshape(length, num_heads, head_dim)
