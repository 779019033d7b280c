"""Other engines on the same requests: `run(name, …)` gives the answers of vLLM, LMDeploy or transformers where it is installed.

Each gets the token ids themselves, the exact output lengths (its end token ignored), at most `max_batch_size` requests at once, and
neither a prefix cache nor a detokenizer where it lets one switch them off. Knows nothing of headrace's engine.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from workloads import Job

PEERS = ("transformers", "vllm", "lmdeploy")


class Run(Protocol):
    """Runs jobs and gives their tokens; `sampled`: at temperature 1, top_p 0.95, top_k 40, else the best token each time."""

    def __call__(self, jobs: Sequence[Job], *, sampled: bool) -> list[list[int]]:
        """Give each job's tokens, in the order of the jobs."""
        ...


class Peer(NamedTuple):
    """An engine that is ready."""

    version: str
    ready_s: float
    run: Run


def require(name: str) -> None:
    """SystemExit with one line where the engine isn't installed."""
    if importlib.util.find_spec(name) is None:
        raise SystemExit(f"{name} is not installed here: install it beside torch {torch.__version__}, or leave --peer out")


def start(name: str, model: Path, *, max_batch_size: int, session_len: int, dtype: str) -> Peer:
    """Load `model` into an engine. SystemExit with one line where it isn't installed."""
    if importlib.util.find_spec(name) is None:
        raise SystemExit(
            f"{name} is not installed here: install it beside this torch ({torch.__version__}), or leave --peer out"
        )
    begin = time.perf_counter()
    run = _STARTERS[name](str(model), max_batch_size, session_len, dtype)
    package = __import__(name)
    return Peer(package.__version__, round(time.perf_counter() - begin, 1), run)


def _vllm(model: str, max_batch_size: int, session_len: int, dtype: str) -> Run:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # where it is installed

    engine = LLM(
        model=model, skip_tokenizer_init=True, dtype=dtype, max_model_len=session_len, max_num_seqs=max_batch_size,
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip

    def run(jobs: Sequence[Job], *, sampled: bool) -> list[list[int]]:
        chosen = {"temperature": 1.0, "top_p": 0.95, "top_k": 40} if sampled else {"temperature": 0.0}
        wanted = [SamplingParams(max_tokens=job.length, ignore_eos=True, detokenize=False, **chosen) for job in jobs]
        outputs = engine.generate([{"prompt_token_ids": list(job.ids)} for job in jobs], wanted, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


def _lmdeploy(model: str, max_batch_size: int, session_len: int, dtype: str) -> Run:
    from lmdeploy import GenerationConfig, TurbomindEngineConfig  # type: ignore[import-not-found]  # where it is installed
    from lmdeploy.turbomind import TurboMind  # type: ignore[import-not-found]

    fields = {"session_len": session_len, "max_batch_size": max_batch_size, "enable_prefix_caching": False, "dtype": dtype}
    engine = TurboMind.from_pretrained(model, engine_config=TurbomindEngineConfig(**fields))
    loop = asyncio.new_event_loop()
    sessions = iter(range(1, 1 << 62))

    async def one(job: Job, index: int, answers: list[list[int]], *, sampled: bool) -> None:
        chosen = {"do_sample": True, "top_k": 40, "top_p": 0.95, "random_seed": index} if sampled else {"top_k": 1}
        config = GenerationConfig(max_new_tokens=job.length, temperature=1.0, ignore_eos=True, **chosen)
        stream = engine.create_instance().async_stream_infer(
            next(sessions), input_ids=list(job.ids), gen_config=config, stream_output=False
        )
        async for output in stream:
            answers[index] += output.token_ids

    async def every(jobs: Sequence[Job], *, sampled: bool) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in jobs]
        todo: Iterator[tuple[int, Job]] = iter(enumerate(jobs))

        async def client() -> None:
            for index, job in todo:
                await one(job, index, answers, sampled=sampled)

        await asyncio.gather(*(client() for _ in range(min(len(jobs), 2 * max_batch_size))))
        return answers

    def run(jobs: Sequence[Job], *, sampled: bool) -> list[list[int]]:
        return loop.run_until_complete(every(jobs, sampled=sampled))

    return run


def _transformers(model: str, max_batch_size: int, session_len: int, dtype: str) -> Run:
    """Run static batches in the given order, each to its longest answer."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)

    def batch(jobs: Sequence[Job], *, sampled: bool) -> list[list[int]]:
        width, longest = max(len(job.ids) for job in jobs), max(job.length for job in jobs)
        if width + longest > session_len:
            raise SystemExit(f"a batch of {width} + {longest} tokens is longer than --session-len {session_len}")
        rows = [[0] * (width - len(job.ids)) + list(job.ids) for job in jobs]
        mask = [[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in jobs]
        chosen: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 40} if sampled else {}
        with torch.inference_mode():
            out = loaded.generate(
                torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device), max_new_tokens=longest,
                eos_token_id=None, pad_token_id=0, **({"do_sample": False} | chosen),
            )  # fmt: skip
        return [out[row, width : width + job.length].tolist() for row, job in enumerate(jobs)]

    def run(jobs: Sequence[Job], *, sampled: bool) -> list[list[int]]:
        found: list[list[int]] = []
        for first in range(0, len(jobs), max_batch_size):
            found += batch(jobs[first : first + max_batch_size], sampled=sampled)
        return found

    return run


_STARTERS = {"vllm": _vllm, "lmdeploy": _lmdeploy, "transformers": _transformers}
