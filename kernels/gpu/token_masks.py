"""Token bitmasks on the GPU: one program for each masked row and stretch of its vocabulary; what may come isn't even read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.quick_launch import ceil_div, quick

_BLOCK = 2048


@quick
@triton.jit
def _allow_only_kernel(p_logits, p_rows, p_words, logits_stride, words_stride, V, W, BLOCK: tl.constexpr):
    i_q = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_rows + i_q)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_word = tl.load(p_words + i_q * words_stride + (o_v >> 5), mask=(o_v >> 5) < W, other=0)
    m_banned = (o_v < V) & (((b_word >> (o_v & 31)) & 1) == 0)
    tl.store(p_logits + i_row * logits_stride + o_v, float("-inf"), mask=m_banned)


def allow_only(logits_RV: Tensor, rows_Q: Tensor, words_QW: Tensor) -> None:
    """See `kernels.sampling.allow_only`."""
    vocab = logits_RV.shape[1]
    if len(rows_Q):
        grid = (len(rows_Q), ceil_div(vocab, _BLOCK))
        _allow_only_kernel[grid](
            logits_RV, rows_Q, words_QW, logits_RV.stride(0), words_QW.stride(0), vocab, words_QW.shape[1], BLOCK=_BLOCK
        )
