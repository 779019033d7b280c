"""What a response format costs: one job with a JSON schema and the same job without, tokens a second of each.

    python benchmarks/structured.py                                       # the default model on a CPU, a few prompts
    python benchmarks/structured.py --device cuda --prompts 1000 --max-batch-size 512 [--model DIR]

Both jobs generate the same number of tokens for each prompt: the job with the schema runs first, with an end; then the job without it,
each answer exactly as long as its twin (`ignore_eos`). So the ratio compares steps, not how talkative a free model is. Behind a first
run of each, in which all gets warm as it is for all but the first seconds of a job, both run in turn, and the medians count: on a GPU
a run takes a second, and one differs from the next.
Every finished answer is validated; one that doesn't ends the run without a figure.

Each run is one JSON line, printed and appended to benchmarks/results/structured.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jsonschema
import ledger
import torch

from engine import garbage
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.guidance import Guides
from engine.model_info import ModelInfo, locate_model
from engine.options import resolve
from engine.request import TokenRequest
from engine.tokenizer import Tokenizer
from headrace.config import GenerationConfig, PytorchEngineConfig

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z.]{3,20}@[a-z]{3,12}\\.(com|org)$"},
        "languages": {"type": "array", "items": {"enum": ["en", "de", "fr", "zh", "hi"]}, "minItems": 1, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 40}, "city": {"type": "string", "maxLength": 30}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "email", "languages", "address", "active"],
    "additionalProperties": False,
}
SAMPLING = {"top_k": 0, "temperature": 0.8, "top_p": 0.95}


RUNS = 5


class Run(NamedTuple):
    """One job's answers and time."""

    token_ids: list[tuple[int, ...]]
    reasons: list[str]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, prompts not counted."""
        return sum(map(len, self.token_ids)) / self.seconds


def run(engine: Engine, requests: Sequence[TokenRequest]) -> Run:
    """Add all requests, step until they are done."""
    begin = time.perf_counter()
    for request in requests:
        engine.add(request)
    ids: dict[str, tuple[int, ...]] = {}
    reasons: dict[str, str] = {}
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise SystemExit(f"request {output.request_id} failed: {output.error}")
            ids[output.request_id] = ids.get(output.request_id, ()) + output.token_ids
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
    names = [request.request_id for request in requests]
    return Run([ids[name] for name in names], [reasons[name] for name in names], time.perf_counter() - begin)


def make_requests(
    prompts: Sequence[tuple[int, ...]], eos_ids: tuple[int, ...], lengths: Sequence[int], **config: Any
) -> list[TokenRequest]:
    return [
        TokenRequest(
            request_id=str(index),
            prompt_ids=ids,
            config=GenerationConfig(max_new_tokens=length, **SAMPLING, **config),
            seed=index,
            choice=0,
            max_new_tokens=length,
            limit="max_new_tokens",
            eos_ids=eos_ids,
        )
        for index, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def validate(answers: Run, tokenizer: Tokenizer) -> int:
    """Check every finished answer; return how many there are."""
    finished = 0
    for ids, reason in zip(answers.token_ids, answers.reasons, strict=True):
        if reason == "stop":
            jsonschema.validate(json.loads(tokenizer.decode(ids)), SCHEMA)
            finished += 1
    return finished


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    path = locate_model(arguments.model)
    tokenizer, info = Tokenizer(path), ModelInfo.read(path)
    config = PytorchEngineConfig(
        device=arguments.device, max_batch_size=arguments.max_batch_size, session_len=1024, enable_prefix_caching=False
    )
    options = resolve(str(path), config)
    engine = Engine(LocalExecutor(options), options, guides=Guides(options.model_path))
    garbage.freeze()  # as an engine's process does
    asked = [[{"role": "user", "content": f"Invent person number {i}."}] for i in range(arguments.prompts)]
    prompts = [tokenizer.encode_chat(tokenizer.render(messages, continue_final=False)) for messages in asked]
    held = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    most = [arguments.max_new_tokens] * len(prompts)
    with_schema, without = [], []
    for _ in range(1 + RUNS):
        with_schema.append(run(engine, make_requests(prompts, info.eos_ids, most, **held)))
        lengths = [max(1, len(ids)) for ids in with_schema[-1].token_ids]
        without.append(run(engine, make_requests(prompts, info.eos_ids, lengths, ignore_eos=True)))
    del with_schema[0], without[0]  # in these all gets warm
    finished = [validate(answers, tokenizer) for answers in with_schema]
    speeds = [statistics.median(one.tokens_per_second for one in runs) for runs in (with_schema, without)]
    return {
        "benchmark": "structured",
        "engine": "headrace",
        "model": path.name,
        "prompts": len(prompts),
        "max_batch_size": arguments.max_batch_size,
        "tokens": sum(lengths),
        "finished_and_valid": min(finished),
        "runs": RUNS,
        "with_schema_tok_s": round(speeds[0], 1),
        "without_tok_s": round(speeds[1], 1),
        "ratio": round(speeds[0] / speeds[1], 3),
        "ratios": [round(a.tokens_per_second / b.tokens_per_second, 3) for a, b in zip(with_schema, without, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--commit", help="where there is no git to ask")
    arguments = parser.parse_args()
    row = measure(arguments)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()} CPU"
    ledger.keep("structured", row | {"device": device}, at_commit=arguments.commit)


if __name__ == "__main__":
    main()
