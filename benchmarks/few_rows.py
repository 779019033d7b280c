"""A decode step of few rows, on cuBLAS and on our GEMMs: what `engine.gemm_table` chooses between, in a whole step.

    python benchmarks/few_rows.py [--rows 1,2,4,8,16,24,32,48,64] [--context 384]

Random weights in the shape of Llama-3.1-8B, made on the device; one captured graph of all layers, without head and sampling. A graph
that isn't equal to the eager step to the last bit ends the run without a figure. CUDA only. One JSON line for each row count, printed and
appended to benchmarks/results/few_rows.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ledger
import torch
import triton
from torch import Tensor

from engine import gemm_table, kv_cache
from engine.layers.embedding import Embedding, Head
from engine.layers.linear import ColumnLinear, RowLinear
from engine.layers.matrix import Matrix
from engine.layers.rope import cos_sin_table
from engine.models.decoder import ROW_BUCKETS, Decoder, Layer, LayerCache, StepInputs, row_bucket
from engine.models.spec import ModelSpec
from engine.parallel import SingleRank
from kernels.attention import AttentionMetadata

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
BLOCK = 64


def random_decoder(device: torch.device) -> Decoder:
    """Weights of std 0.02, norms around 1."""
    spec = ModelSpec.read(CONFIG)
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    layers = tuple(
        Layer(
            input_norm_D=1 + draw(hidden),
            qkv=ColumnLinear(Matrix(draw(heads + 2 * spec.num_kv_heads * spec.head_dim, hidden))),
            q_norm_H=None,
            k_norm_H=None,
            output=RowLinear(Matrix(draw(hidden, heads)), None, SingleRank()),
            mlp_norm_D=1 + draw(hidden),
            gate_up=ColumnLinear(Matrix(draw(2 * spec.intermediate_size, hidden))),
            down=RowLinear(Matrix(draw(hidden, spec.intermediate_size)), None, SingleRank()),
            window=None,
        )
        for _ in range(spec.num_layers)
    )
    table_MH = cos_sin_table(spec.rope, head_dim=spec.head_dim, positions=8192, device=device)
    ends = draw(spec.vocab_size, hidden)
    head = Head(Matrix(ends), spec.vocab_size, SingleRank())
    return Decoder(spec=spec, embedding=Embedding(ends), layers=layers, norm_D=1 + draw(hidden), head=head, cos_sin_MH=table_MH)


def inputs(rows: int, context: int, device: torch.device) -> StepInputs:
    """One token for each row, at the end of a context of its own blocks."""
    pages = -(-context // BLOCK)
    attention = AttentionMetadata(
        block_tables_RP=torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages),
        query_start_R1=torch.arange(rows + 1, dtype=torch.int32, device=device),
        context_lens_R=torch.full((rows,), context, dtype=torch.int32, device=device),
        num_single=rows,
        max_query_len=1,
        max_context_len=context,
    )
    return StepInputs(
        tokens_T=torch.arange(rows, dtype=torch.int32, device=device) + 5,
        positions_T=torch.full((rows,), context - 1, device=device),
        slots_T=torch.arange(rows, device=device) * (pages * BLOCK) + context - 1,
        attention=attention,
        sampled_R=None,
    )


@torch.inference_mode()
def step_ms(decoder: Decoder, step: StepInputs, caches: tuple[LayerCache, ...]) -> float:
    """Median time of a replay; the graph must give what the eager step gives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = decoder.hidden(step, caches).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = decoder.hidden(step, caches)
    graph.replay()
    if not torch.equal(out, eager):
        raise SystemExit("the graph differs from the eager step; no figure is reported")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(16)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in itertools.pairwise(events))
    return times[len(times) // 2]


def main() -> None:
    """Time both ways for each row count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=lambda text: [int(one) for one in text.split(",")], default=[1, 2, 4, 8, 16, 24, 32, 48, 64]
    )
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "few_rows.jsonl")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    decoder = gemm_table.with_table(random_decoder(device))
    blocks = max(arguments.rows) * -(-arguments.context // BLOCK)
    caches = kv_cache.allocate(decoder.spec, num_blocks=blocks, block_size=BLOCK, dtype=torch.bfloat16, device=device)
    for rows in arguments.rows:
        step = inputs(rows, arguments.context, device)
        cublas = step_ms(replace(decoder, few_rows=frozenset()), step, caches)
        ours = step_ms(replace(decoder, few_rows=frozenset(ROW_BUCKETS)), step, caches)
        line = {"benchmark": "few_rows", "rows": rows, "context": arguments.context, "cublas_ms": round(cublas, 3)}
        line |= {"ours_ms": round(ours, 3), "chosen": "ours" if row_bucket(rows) in decoder.few_rows else "cublas"}
        line |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        line |= {"command": "python benchmarks/few_rows.py " + " ".join(sys.argv[1:])}
        ledger.keep(arguments.out, line, at_commit=arguments.commit)


if __name__ == "__main__":
    main()
