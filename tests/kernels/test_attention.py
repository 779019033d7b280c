"""Paged attention's reference against attention written position by position in float64, in caches full of NaN."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ATTENTION_TOLERANCE, AttentionCase, attention_case, naive_attention, relative_error

from kernels.attention import paged_attention

MIXED = [(1, 1), (1, 63), (1, 100), (1, 16), (1, 200), (63, 63), (5, 70), (100, 100), (2, 17)]


def check(case: AttentionCase) -> None:
    out = paged_attention(
        case.q_TNH,
        case.k_cache_BKSH,
        case.v_cache_BKSH,
        case.metadata,
        scale=case.scale,
        sliding_window=case.sliding_window,
        scales=case.scales,
    )
    assert out.shape == case.q_TNH.shape
    assert out.dtype == case.q_TNH.dtype
    assert relative_error(out, naive_attention(case)) < ATTENTION_TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (16, 1)])
def test_mixed_rows(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(attention_case(MIXED, heads=heads, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64])
def test_head_dims_and_block_sizes(head_dim: int, block_size: int) -> None:
    check(attention_case(MIXED, head_dim=head_dim, block_size=block_size, seed=head_dim))


@pytest.mark.parametrize("window", [1, 17, 64, 500])
def test_sliding_window(window: int) -> None:
    check(attention_case(MIXED, sliding_window=window, seed=window))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 17])
def test_a_cache_of_integers(window: int | None, dtype: torch.dtype) -> None:
    check(attention_case(MIXED, heads=6, kv_heads=2, head_dim=96, dtype=dtype, sliding_window=window, int8=True))


def test_lengths_read_from_the_device_when_the_host_has_none() -> None:
    check(attention_case(MIXED, host_lens=False))


def test_many_decode_rows_of_mixed_lengths() -> None:
    lens = [(1, int(n)) for n in torch.randint(1, 300, (77,))]
    check(attention_case(lens, heads=6, kv_heads=2, block_size=32, seed=5))


def test_padding_rows_give_zeros() -> None:
    case = attention_case([(1, 0), (1, 33), (1, 0)])
    out = paged_attention(case.q_TNH, case.k_cache_BKSH, case.v_cache_BKSH, case.metadata, scale=case.scale)
    assert not out[[0, 2]].any()
    check(case)


def test_a_new_step_is_not_served_with_the_last_ones_layout() -> None:
    """The layout is kept across a step's layers; the same tensors with new lengths are another step."""
    case = attention_case([(1, 40), (1, 90)])
    check(case)
    shorter = case.metadata._replace(host_context_lens=(39, 90), context_lens_R=torch.tensor([39, 90], dtype=torch.int32))
    check(AttentionCase(**{**case.__dict__, "metadata": shorter}))
    check(case)
