"""Paged attention on the GPU: a launch for the rows of one token and a launch for the others."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.gpu import decode_attention, prefill_attention

if TYPE_CHECKING:
    from kernels.attention import AttentionMetadata


@cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; an H100's where kernels are interpreted on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def paged_attention(
    q_TNH: Tensor,
    k_cache_BKSH: Tensor,
    v_cache_BKSH: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """See `kernels.attention.paged_attention`."""
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    num_kv_heads, size, head_dim = k_cache_BKSH.shape[1:]
    num_rows, num_single = len(metadata.context_lens_R), metadata.num_single
    itemsize = k_cache_BKSH.element_size()
    if num_single:
        decode_attention.decode_attention(
            q_TNH[:num_single],
            k_cache_BKSH,
            v_cache_BKSH,
            metadata.block_tables_RP,
            metadata.context_lens_R,
            out_TNH,
            scale=scale,
            sliding_window=sliding_window,
            shape=decode_attention.choose_shape(
                rows=num_single,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                block_size=size,
                itemsize=itemsize,
                max_context=metadata.max_context_len,
                num_sms=_num_sms(q_TNH.device),
            ),
        )
    if num_rows > num_single:
        prefill_attention.prefill_attention(
            q_TNH,
            k_cache_BKSH,
            v_cache_BKSH,
            metadata.block_tables_RP,
            metadata.query_start_R1,
            metadata.context_lens_R,
            out_TNH,
            first_row=num_single,
            num_rows=num_rows - num_single,
            max_query_len=metadata.max_query_len,
            scale=scale,
            sliding_window=sliding_window,
            shape=prefill_attention.choose_shape(head_dim=head_dim, block_size=size, itemsize=itemsize),
        )
    return out_TNH
