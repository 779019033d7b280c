"""What an 8-bit KV cache costs a real model in accuracy, in nats a token.

    python benchmarks/kv_int8.py [--model smollm2] [--device cpu] [--tokens 3000] [--out FILE]

The texts are this repository's own: prose and code, which no model has been trained on. Each is scored with the KV cache in the weights'
type and in integers (`get_ppl`): the difference of the mean cross-entropies is what rounding did. One JSON line, appended to
benchmarks/results/kv_int8.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import ledger
from transformers import AutoTokenizer

from headrace import PytorchEngineConfig, pipeline

TEXTS = (
    *(
        "README.md",
        "benchmarks/README.md",
        "docs/architecture.md",
        "docs/environment.md",
        "docs/lifecycle.md",
        "docs/promise.md",
    ),
    *("docs/security.md", "docs/tensor-parallel.md", "engine/scheduler.py", "headrace/client.py", "kernels/gpu/decode_plan.py"),
)


def main() -> int:
    """Score the texts both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=3000, help="most tokens of a text")
    parser.add_argument("--out", type=Path, default=ledger.RESULTS / "kv_int8.jsonl")
    parser.add_argument("--commit", help="where there is no git to ask")
    arguments = parser.parse_args()
    nats: dict[int, list[float]] = {}
    lengths: list[int] = []
    for policy in (0, 8):
        config = PytorchEngineConfig(
            device=arguments.device, session_len=arguments.tokens + 1, max_batch_size=8, quant_policy=policy
        )
        with pipeline(arguments.model, backend_config=config) as pipe:
            tokenizer = AutoTokenizer.from_pretrained(pipe.report()["options"]["model_path"])
            ids = [tokenizer((ROOT / name).read_text(encoding="utf-8"))["input_ids"][: arguments.tokens] for name in TEXTS]
            lengths = [len(one) for one in ids]
            nats[policy] = pipe.get_ppl(ids)
    total = sum(lengths)
    means = {
        policy: sum(one * count for one, count in zip(each, lengths, strict=True)) / total for policy, each in nats.items()
    }
    differences = [rounded - exact for exact, rounded in zip(nats[0], nats[8], strict=True)]
    ledger.keep(
        arguments.out,
        {
            "benchmark": "kv_int8",
            "engine": "headrace",
            "workload": "cross-entropy of this repository's texts",
            "model": Path(arguments.model).name,
            "tokens": total,
            "nats": round(means[0], 5),
            "nats_int8": round(means[8], 5),
            "difference": round(means[8] - means[0], 5),
            "largest_difference_of_a_text": round(max(differences, key=abs), 5),
            "device": arguments.device,
        },
        at_commit=arguments.commit,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
