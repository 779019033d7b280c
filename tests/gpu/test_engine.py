"""The engine on a GPU: transformers' tokens in float32, graphs equal to eager steps, bfloat16 no worse than transformers'."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import relative_error
from tiny_models import ARCHITECTURES, save_tiny_model

from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.models.decoder import Decoder
from engine.models.loading import load_decoder
from engine.options import resolve
from engine.parallel import SingleRank
from engine.request import TokenRequest
from headrace.config import GenerationConfig, PytorchEngineConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LENGTHS = (1, 3, 17, 63, 64, 65, 130, 200)


@pytest.fixture(autouse=True)
def _exact_float32() -> Any:
    """TF32 would round both sides, each its own way."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def prompts(vocab: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(3, vocab) for _ in range(length)) for length in LENGTHS]


def generate(path: Path, jobs: list[tuple[int, ...]], gen: GenerationConfig, **fields: Any) -> list[tuple[int, ...]]:
    given: dict[str, Any] = {
        "device": "cuda",
        "dtype": "float32",
        "num_gpu_blocks": 64,
        "max_batch_size": 16,
        "session_len": 512,
    }
    options = resolve(path, PytorchEngineConfig(**{**given, **fields}))
    executor = LocalExecutor(options)
    engine = Engine(executor, options)
    for index, ids in enumerate(jobs):
        engine.add(
            TokenRequest(
                request_id=str(index), prompt_ids=ids, config=gen, seed=index, choice=0,
                max_new_tokens=gen.max_new_tokens or 1, limit="max_new_tokens",
            )
        )  # fmt: skip
    out: list[tuple[int, ...]] = [()] * len(jobs)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            out[int(output.request_id)] += output.token_ids
    engine.check_integrity()
    executor.close()
    return out


def reference(path: Path, jobs: list[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).cuda()
    out = []
    for ids in jobs:
        whole = model.generate(
            torch.tensor([ids], device="cuda"), attention_mask=torch.ones(1, len(ids), device="cuda", dtype=torch.int64),
            max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        out.append(tuple(whole[0, len(ids) :].tolist()))
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_of_transformers(tmp_path: Path, architecture: str) -> None:
    path = save_tiny_model(tmp_path / architecture, architecture)
    jobs = prompts(300, seed=1)
    expected = reference(path, jobs, 40)
    greedy = GenerationConfig(top_k=1, max_new_tokens=40)
    assert generate(path, jobs, greedy) == expected
    assert generate(path, jobs, greedy, max_prefill_token_num=37) == expected
    assert generate(path, jobs, greedy, num_gpu_blocks=5) == expected
    assert generate(path, jobs, greedy, block_size=16, num_gpu_blocks=256) == expected
    assert [generate(path, [ids], greedy)[0] for ids in jobs[:3]] == expected[:3]


@pytest.mark.parametrize(("dtype", "policy"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 8)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_graphs_equal_eager_bit_for_bit(tmp_path: Path, dtype: str, policy: int, head_dim: int) -> None:
    """Sampled, so that every bit of the logits counts."""
    path = save_tiny_model(tmp_path / "llama", "llama", head_dim=head_dim, hidden_size=256, intermediate_size=320)
    jobs = prompts(300, seed=2)
    sampled = GenerationConfig(top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=60, logprobs=3)
    # One shape of batch throughout: another padding is another GEMM, which may round in another way.
    jobs = [jobs[5]] * 16
    graphs = generate(path, jobs, sampled, dtype=dtype, quant_policy=policy)
    eager = generate(path, jobs, sampled, dtype=dtype, quant_policy=policy, eager_mode=True)
    assert graphs == eager
    assert len(set(graphs)) > 8


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = save_tiny_model(
        tmp_path / "llama",
        "llama",
        head_dim=64,
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=512,
        initializer_range=0.05,
    )
    ids = torch.tensor([prompts(300, seed=3)[-1]], device="cuda")
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).cuda()(ids).logits[0].double()
        theirs = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.bfloat16).cuda()(ids).logits[0].double()
        decoder = load_decoder(
            path, dtype=torch.bfloat16, device=torch.device("cuda", 0), group=SingleRank(), max_positions=512
        )
        ours = _logits(decoder, ids[0], len(ids[0])).double()
    error, their_error = (ours - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    assert error <= their_error * 1.05, (float(error), float(their_error))


@pytest.mark.parametrize("singles", [0, 1, 9])
def test_an_int8_cache_gives_the_logits_of_the_cpu(tmp_path: Path, singles: int) -> None:
    """A prompt whose last tokens are computed one by one. The CPU's are held to transformers (tests/engine/test_int8_kv.py)."""
    path = save_tiny_model(tmp_path / "llama", "llama", head_dim=128, hidden_size=256, intermediate_size=512)
    ids = torch.tensor(prompts(300, seed=4)[-1])
    both = []
    with torch.inference_mode():
        for device in (torch.device("cpu"), torch.device("cuda", 0)):
            decoder = load_decoder(path, dtype=torch.float32, device=device, group=SingleRank(), max_positions=512)
            both.append(_logits(decoder, ids.to(device), len(ids) - singles, int8=True).double().cpu())
    # Products with integers are made in float16.
    assert relative_error(both[1], both[0]) < 4e-3


def _logits(decoder: Decoder, ids_T: torch.Tensor, at_once: int, *, int8: bool = False) -> torch.Tensor:
    """Logits of all positions, `at_once` of them computed in one step and the rest one by one."""
    from engine import kv_cache
    from engine.models.decoder import StepInputs
    from kernels.attention import AttentionMetadata

    device, dtype = ids_T.device, decoder.embedding.weight_VD.dtype
    caches = kv_cache.allocate(decoder.spec, num_blocks=8, block_size=64, dtype=dtype, device=device, int8=int8)
    out = []
    for start, count in [(0, at_once), *((place, 1) for place in range(at_once, len(ids_T)))]:
        positions = torch.arange(start, start + count, device=device)
        attention = AttentionMetadata(
            block_tables_RP=torch.arange(8, dtype=torch.int32, device=device)[None],
            query_start_R1=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_lens_R=torch.tensor([start + count], dtype=torch.int32, device=device),
            num_single=int(count == 1), max_query_len=count, max_context_len=start + count,
        )  # fmt: skip
        tokens = ids_T[start : start + count].int()
        inputs = StepInputs(tokens_T=tokens, positions_T=positions, slots_T=positions, attention=attention, sampled_R=None)
        out.append(decoder.forward(inputs, caches))
    return torch.cat(out)
