"""The plain PyTorch ops against float64 mathematics written another way."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import relative_error

import kernels
from kernels.attention import KVScales
from kernels.blocks import copy_blocks, swap_blocks
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary_kv_write
from kernels.silu_mul import silu_mul

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def norm64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (63, 100), (7, 576)])
def test_rms_norm(tokens: int, dim: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(tokens, dim, dtype=dtype) * 3, torch.randn(dim, dtype=dtype)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    assert relative_error(out, norm64(x, weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_norms_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(63, 100, dtype=dtype), torch.randn(63, 100, dtype=dtype), torch.randn(100, dtype=dtype)
    out, total = add_rms_norm(x, residual.clone(), weight, 1e-6)
    assert torch.equal(total, (x.double() + residual.double()).to(dtype))
    assert relative_error(out, norm64(total, weight, 1e-6)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (63, 100), (5, 1536)])
def test_silu_mul(tokens: int, dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, 2 * dim, dtype=dtype) * 4
    before = x.clone()
    gate, up = x.double().split(dim, dim=1)
    assert relative_error(silu_mul(x), gate / (1 + (-gate).exp()) * up) < TOLERANCE[dtype]
    assert torch.equal(x, before)


def rotated64(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + half) turned as complex numbers; dims past the angles untouched."""
    half = angles.shape[1]
    x = x.double()
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "rotary"), [(1, 1, 1, 64, 64), (63, 6, 2, 96, 96), (9, 3, 3, 128, 32)]
)
@pytest.mark.parametrize("norm", [False, True])
def test_rotary_kv_write(tokens: int, heads: int, kv_heads: int, dim: int, rotary: int, norm: bool, dtype: torch.dtype) -> None:
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(200, rotary // 2, dtype=torch.float64) * 6
    positions = torch.randint(0, 200, (tokens,))
    blocks, size = tokens // 8 + 2, 8
    slots = torch.randperm(blocks * size)[:tokens]
    if tokens > 2:
        slots[1] = -1
    k_cache, v_cache = torch.full((2, blocks, kv_heads, size, dim), torch.nan, dtype=dtype)
    q_weight, k_weight = (torch.randn(dim, dtype=dtype), torch.randn(dim, dtype=dtype)) if norm else (None, None)
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1).float()
    before = qkv.clone()
    out = rotary_kv_write(q, k, v, cos_sin, positions, slots, k_cache, v_cache, q_weight, k_weight, 1e-6)

    q64, k64 = (norm64(q, q_weight, 1e-6), norm64(k, k_weight, 1e-6)) if norm else (q, k)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert relative_error(out, rotated64(q64, angles[positions])) < TOLERANCE[dtype]
    assert torch.equal(qkv, before)
    written = slots >= 0
    flat_k, flat_v = (cache.transpose(1, 2).flatten(0, 1) for cache in (k_cache, v_cache))
    assert relative_error(flat_k[slots[written]], rotated64(k64, angles[positions])[written]) < TOLERANCE[dtype]
    assert torch.equal(flat_v[slots[written]], v[written])
    untouched = torch.ones(blocks * size, dtype=torch.bool)
    untouched[slots[written]] = False
    assert flat_k[untouched].isnan().all()
    assert flat_v[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_in_integers(dtype: torch.dtype) -> None:
    """Against the rounding written out: the nearest of 255 steps between minus and plus the largest magnitude of a head."""
    k, v = torch.randn(2, 7, 3, 64, dtype=dtype) * torch.logspace(-3, 3, 7, dtype=dtype)[:, None, None]
    v[2, 1] = 0
    k[3, 0, 5], v[4, 2, 63] = torch.inf, torch.nan
    cos_sin = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1)
    slots = torch.tensor([5, -1, 0, 9, 15, 3, 8])
    caches = [torch.full((2, 3, 8, 64), 99, dtype=torch.int8), torch.full((2, 3, 2, 64, 4), 99, dtype=torch.int8)]
    scales = KVScales(*torch.full((2, 2, 3, 8), torch.nan))
    rotary_kv_write(k, k, v, cos_sin, torch.zeros(7, dtype=torch.int64), slots, *caches, scales=scales)
    by_position = [caches[0], caches[1].transpose(-1, -2).reshape(2, 3, 8, 64)]
    for x, cache, scale in zip((k, v), by_position, scales, strict=True):
        flat, flat_scale = cache.transpose(1, 2).flatten(0, 1).double(), scale.transpose(1, 2).flatten(0, 1).double()
        assert flat_scale.isnan().all(-1).sum() == 16 - 6
        for token, slot in enumerate(slots.tolist()):
            for head in range(3) if slot >= 0 else ():
                got, want = flat[slot, head] * flat_scale[slot, head], x[token, head].double()
                if not want.isfinite().all():
                    assert not got.isfinite().any()
                    continue
                step = want.abs().max() / 127
                assert (got - want).abs().max() <= step * 0.501
                assert flat[slot, head].abs().max() == (127 if step else 0)


def test_copy_blocks() -> None:
    caches = [torch.randn(9, 2, 4, 8), torch.randn(9, 3)]
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, [(1, 5), (1, 6), (8, 0)])
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[[8, 1, 2, 3, 4, 1, 1, 7, 8]])
    copy_blocks(caches, [])
    copy_blocks([], [(1, 2)])


def test_swap_blocks() -> None:
    device, host = [torch.randn(6, 2, 4), torch.randn(6, 3)], [torch.randn(9, 2, 4), torch.randn(9, 3)]
    before = [cache.clone() for cache in host]
    swap_blocks(device, host, [(1, 8), (5, 0), (1, 2)])
    for cache, old, source in zip(host, before, device, strict=True):
        assert torch.equal(cache[[8, 0, 2]], source[[1, 5, 1]])
        assert torch.equal(cache[[1, 3, 4, 5, 6, 7]], old[[1, 3, 4, 5, 6, 7]])
    back = [torch.zeros_like(cache) for cache in device]
    swap_blocks(host, back, torch.tensor([(8, 1), (0, 5)]))
    for cache, source in zip(back, device, strict=True):
        assert torch.equal(cache[[1, 5]], source[[1, 5]])
        assert not cache[[0, 2, 3, 4]].any()
    swap_blocks(device, host, [])
    with pytest.raises(ValueError, match="1 caches to swap from and 2 to swap to"):
        swap_blocks(device[:1], host, [(0, 0)])
    with pytest.raises(ValueError, match="don't fit"):
        swap_blocks(device, [host[0].half(), host[1]], [(0, 0)])


def test_transformers_does_not_take_this_package_for_its_own() -> None:
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()
    assert not hasattr(kernels, "__version__")
