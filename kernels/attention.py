"""Causal attention over a paged KV cache: one call for a step that mixes rows of one token and rows of many.

Knows nothing of requests or of how blocks are handed out: a row is a block table and two lengths.

A cache is [B, K, S, H]: block, kv head, position in the block, head dim. Position p of a row lies in block
`block_tables_RP[row, p // S]` at p % S; nothing at or past the row's context length is ever read into a result.

A cache may hold 8-bit integers: then each position of each kv head has a scale of its own (`KVScales`), and what is attended to is
the integers times it. Such values lie as [B, K, S / 4, H, 4] (`reference.by_position` turns them): the sum over positions takes four of
one dimension at once, and those must be one word for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kernels import reference_attention

if TYPE_CHECKING:
    from kernels.gpu.decode_plan import DecodePlan
    from kernels.gpu.int8_cache import UnpackedRows


class AttentionMetadata(NamedTuple):
    """Which tokens of a step belong to which row, and where each row's keys and values lie.

    Rows with exactly one query token come first. A query token i of a row with Q of them and a context of C stands at
    position C - Q + i and sees every position up to its own.
    """

    block_tables_RP: Tensor
    """int32 [R, P]; entries past a row's last block are not read."""
    query_start_R1: Tensor
    """int32 [R + 1]: row r's query tokens are query_start[r] .. query_start[r + 1] - 1."""
    context_lens_R: Tensor
    """int32 [R]: positions in the cache, this step's tokens included. 0 = a padding row; its output is zeros."""
    num_single: int
    """How many rows, from the first, have exactly one query token: token r belongs to row r for these."""
    max_query_len: int
    """At least the longest row's query length (the grid of the prefill kernel)."""
    max_context_len: int
    """At least the longest row's context. No kernel needs it now: a launch serves any context up to P · S."""
    query_lens: tuple[int, ...] | None = None
    """Host copy of the rows' query lengths; the CPU path reads it where given."""
    host_context_lens: tuple[int, ...] | None = None
    """Host copy of `context_lens_R`, a new tuple each step: the CPU path keeps what it derives from it across layers; a GPU plans by it
    how int8 pages are unpacked."""
    plans: tuple[DecodePlan, ...] = ()
    """How the GPU shares the single-token rows, one plan for each sliding window; filled by `plan_attention`."""
    unpacking: tuple[UnpackedRows, ...] = ()
    """How the GPU unpacks an int8 cache for the rows of many tokens; filled by `plan_attention`."""


class KVScales(NamedTuple):
    """What the integers of an int8 cache are multiplied with: float32 [B, K, S], one for each position of each kv head."""

    k_BKS: Tensor
    v_BKS: Tensor


UNPACKED_POSITIONS = 1 << 16
"""Positions of one layer's int8 cache that a GPU unpacks at once for rows of many tokens; a row that alone has more is unpacked whole."""


def plan_attention(
    metadata: AttentionMetadata, k_cache_BKSH: Tensor, *, windows: Iterable[int | None] = (None,)
) -> AttentionMetadata:
    """Give the metadata with the single-token rows shared among the GPU's programs: once a step, for all of its layers.

    `k_cache_BKSH`: any layer's cache (all are alike); `windows`: the sliding windows of the step's layers. A call of
    `paged_attention` for which there is no plan makes its own, at a launch more. The plan holds for the lengths that
    `context_lens_R` has when it is made; in a captured graph it must be made inside the capture. On a CPU nothing is planned.
    """
    if not k_cache_BKSH.is_cuda:
        return metadata
    from kernels.gpu import attention as gpu

    return gpu.plan_attention(metadata, k_cache_BKSH, windows)


def paged_attention(
    q_TNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    scales: KVScales | None = None,
) -> Tensor:
    """softmax(scale · q·k) · v of every query token over its row's cached positions. Gives [T, N, H] in q's dtype.

    N must be a multiple of K (grouped queries). `sliding_window` W: a query at position p sees p - W + 1 .. p only.
    This step's own keys and values must be in the cache already (`rotary_kv_write`). `scales` belong to int8 caches; others are in q's dtype.
    """
    if q_TNH.is_cuda:
        from kernels.gpu import attention as gpu

        return gpu.paged_attention(q_TNH, k_cache_BKSH, v_cache_BKSH, metadata, scale, sliding_window, scales)
    return reference_attention.paged_attention(q_TNH, k_cache_BKSH, v_cache_BKSH, metadata, scale, sliding_window, scales)
