"""Every kernel, with the configuration its launch code picks, compiles for the devices we serve and fits them. No GPU needed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has replaced the compiler in this process", allow_module_level=True)

from kernel_cases import ATTENTION_SHAPES, attention_case, sampling_inputs
from kernel_launches import Launch, compile_for, recorded

from kernels.all_reduce import Peers
from kernels.attention import KVScales
from kernels.gpu import all_reduce, attention, blocks, decode_attention, rms_norm, rotary, sampling, silu_mul, token_masks
from kernels.gpu.decode_plan import choose_shape, first_rows, plan_decode

# Bytes of shared memory that one program may take.
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SERVERS = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def small_launches(dtype: torch.dtype) -> Iterator[Launch]:
    with recorded() as launches:
        for dim in (576, 8192):
            x, weight = torch.zeros(3, dim, dtype=dtype), torch.zeros(dim, dtype=dtype)
            rms_norm.rms_norm(x, weight, 1e-5)
            rms_norm.add_rms_norm(x, x.clone(), weight, 1e-5)
        silu_mul.silu_mul(x)
        blocks.copy_blocks([x], torch.tensor([[0, 1]]))
        for head_dim, rotary_dim in ((64, 64), (96, 96), (128, 64)):
            q, k, v = torch.zeros(3, 8, head_dim, dtype=dtype).split([4, 2, 2], dim=1)
            cache = torch.zeros(4, 2, 16, head_dim, dtype=dtype)
            index = torch.zeros(3, dtype=torch.int64)
            for weight in (None, torch.zeros(head_dim, dtype=dtype)):
                rotary.rotary_kv_write(q, k, v, torch.zeros(9, rotary_dim), index, index, cache, cache, weight, weight, 1e-6)
            integers, scales = cache.to(torch.int8), KVScales(torch.zeros(4, 2, 16), torch.zeros(4, 2, 16))
            rotary.rotary_kv_write(
                q, k, v, torch.zeros(9, rotary_dim), index, index, integers, integers, None, None, 1e-6, scales
            )
    yield from launches


def all_reduce_launches(size: int, dtype: torch.dtype) -> Iterator[Launch]:
    with recorded() as launches:
        for dim in (576, 8192):
            parts = tuple(torch.zeros(3 * dim, dtype=dtype) for _ in range(size))
            peers = Peers(1, parts, -32, torch.zeros(all_reduce.MAX_PROGRAMS, dtype=torch.int32))
            all_reduce.one_shot(peers, 3, dim)
            all_reduce.one_shot_add_rms_norm(peers, torch.zeros(3, dim, dtype=dtype), torch.zeros(dim, dtype=dtype), 1e-5)
            all_reduce.two_shot(peers, 3, dim)
            all_reduce.gather_columns(peers, 3, dim)
            x = torch.zeros(3, dim, dtype=dtype)
            all_reduce.share_add_rms_norm(peers, x, parts[0], x.clone(), x[0], 1e-5, share=3)
    yield from launches


def sampling_launches() -> Iterator[Launch]:
    with recorded() as launches:
        for flags in ((False,) * 4, (True, False, False, False), (True,) * 4):
            sampling.sample(torch.zeros(3, 128256), sampling_inputs(3), *flags)
        token_masks.allow_only(torch.zeros(3, 128256), torch.tensor([2, 0]), torch.zeros(2, 4008, dtype=torch.int32))
    yield from launches


def attention_launches(
    heads: int, kv_heads: int, head_dim: int, size: int, dtype: torch.dtype, *, int8: bool = False
) -> Iterator[Launch]:
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": size, "dtype": dtype, "int8": int8}
    case = attention_case([(1, 700), (5, 70)], **options)
    with recorded() as launches:
        for window in (None, 64) if head_dim == 128 else (None,):
            attention.paged_attention(
                case.q_TNH, case.k_cache_BKSH, case.v_cache_BKSH, case.metadata, case.scale, window, case.scales
            )
    yield from launches


def check(launches: Iterator[Launch], capability: int) -> None:
    names = set()
    for launch in launches:
        compiled = compile_for(launch, capability)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], launch
        names.add(launch.name)
    assert names


@pytest.mark.parametrize("capability", SERVERS)
def test_small_ops(capability: int) -> None:
    check(small_launches(torch.bfloat16), capability)


@pytest.mark.parametrize(("capability", "size", "dtype"), [(80, 2, "fp16"), (90, 2, "bf16"), (100, 4, "fp32")])
def test_all_reduce(capability: int, size: int, dtype: str) -> None:
    launches = list(all_reduce_launches(size, DTYPES[dtype]))
    check(iter(launches), capability)
    for launch in launches:
        ptx = compile_for(launch, capability).asm["ptx"]
        meetings = 1 if launch.name == "_one_shot_kernel" else 2
        assert ptx.count("st.release.sys") == ptx.count("ld.acquire.sys") == meetings * (size - 1)
        # What a rank reads of its peers lies behind the meeting.
        assert "ld.global.cg" not in ptx.partition("ld.acquire.sys")[0]


@pytest.mark.parametrize("capability", SERVERS)
def test_sampling(capability: int) -> None:
    check(sampling_launches(), capability)


@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_on_hopper(shape: tuple[int, int, int, int]) -> None:
    check(attention_launches(*shape, torch.bfloat16), 90)


@pytest.mark.parametrize(
    ("shape", "capability", "dtype"),
    [(shape, *((80, "fp16"), (89, "fp32"), (90, "bf16"))[index % 3]) for index, shape in enumerate(ATTENTION_SHAPES)],
    ids=str,
)
def test_attention_to_integers(shape: tuple[int, int, int, int], capability: int, dtype: str) -> None:
    launches = list(attention_launches(*shape, DTYPES[dtype], int8=True))
    check(iter(launches), capability)
    assert "_unpack_kernel" in {launch.name for launch in launches}
    # A word of four values makes two pairs: nothing is read from shared memory byte by byte, nor widened one by one.
    ptx = [compile_for(launch, capability).asm["ptx"] for launch in launches if launch.name == "decode_int8_kernel"]
    assert ptx
    assert all("sub.f16x2" in text and "ld.shared.b8" not in text and "ld.shared.u8" not in text for text in ptx)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("shape", [(32, 8, 128, 64), (4, 4, 256, 64)], ids=str)
def test_attention_elsewhere(shape: tuple[int, int, int, int], capability: int) -> None:
    check(attention_launches(*shape, torch.bfloat16), capability)


# An L4, a 4090 and the like have the least shared memory. A head of 80 or 96 takes as much of it as one of 128.
@pytest.mark.parametrize(("capability", "head_dim"), [(89, 64), (89, 80), (89, 128), (80, 128), (90, 96), (90, 128)])
def test_the_deepest_decode_launch_fits(capability: int, head_dim: int) -> None:
    facts = {"head_dim": head_dim, "block_size": 64, "itemsize": 2, "shared_memory": SHARED_MEMORY[capability]}
    shapes = [
        choose_shape(rows=rows, num_kv_heads=2, num_sms=8, **facts)
        for rows in first_rows(num_kv_heads=2, num_sms=8, itemsize=2)
    ]
    deepest = max(shapes, key=lambda shape: shape.stages * shape.tile)
    case = attention_case([(1, 700)] * 3, heads=8, kv_heads=2, head_dim=head_dim, block_size=64, dtype=torch.bfloat16)
    with recorded() as launches:
        plan = plan_decode(case.metadata.context_lens_R, num_kv_heads=2, sliding_window=None, shape=deepest)
        decode_attention.decode_attention(
            case.q_TNH,
            case.k_cache_BKSH,
            case.v_cache_BKSH,
            case.metadata.block_tables_RP,
            plan,
            torch.empty_like(case.q_TNH),
            scale=1.0,
        )
    check(iter(launches), capability)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_attention_in_other_types(head_dim: int, dtype: str) -> None:
    check(attention_launches(8, 2, head_dim, 64, DTYPES[dtype]), 80)


def test_prefill_runs_on_the_tensor_cores_of_hopper() -> None:
    launches = [x for x in attention_launches(32, 8, 128, 64, torch.bfloat16) if x.name == "_prefill_kernel"]
    assert launches
    assert all("wgmma.mma_async" in compile_for(launch, 90).asm["ptx"] for launch in launches)
