"""The real engine, with prompts in it that do it harm: what a bug of a kernel or a driver does, at a word.

`HEADRACE_ENGINE_FRONTEND=harsh_engine:HarshFrontend` starts this file as the rank. It is `engine.rank` with one thing between it and
its engine, which looks at the prompts' text for these signs, and at SIGUSR1, after which the next step reports a device without memory.
`HARSH_WATCHDOG_S`: after so many seconds without a sign of life the supervisor kills an engine.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from engine import rank  # noqa: E402
from engine.frontend import Frontend  # noqa: E402
from engine.request import TokenOutput, TokenRequest  # noqa: E402
from engine.supervisor import Limits  # noqa: E402

KILLS, HANGS, FLOODS, GARBLES, SAYS_NOTHING = "☠", "⏳", "🌊", "💥", "🤐"
"""Kills the process; never comes back from its step; answers with HARSH_FLOOD characters; with bytes that are no UTF-8; with no token."""


class HarshFrontend(Frontend):
    """The real frontend, whose engine is this file."""

    def __init__(self, model_path: str, **options: Any) -> None:
        limits = Limits(watchdog_s=float(os.environ.get("HARSH_WATCHDOG_S", "600")))
        super().__init__(model_path, engine_command=(sys.executable, "-P", __file__), limits=limits, **options)


class HarshEngine:
    """Stands before `engine.engine.Engine` and has the methods that `engine.rank.serve` uses."""

    def __init__(self, engine: Any, model_path: str) -> None:
        from tokenizers import Tokenizer

        self._engine = engine
        self._tokenizer = Tokenizer.from_file(str(Path(model_path) / "tokenizer.json"))
        self._texts: dict[str, str] = {}
        self._no_memory = False
        self.abort, self.stats = engine.abort, engine.stats
        signal.signal(signal.SIGUSR1, self._take_memory)

    @property
    def has_work(self) -> bool:
        return bool(self._engine.has_work)

    def _take_memory(self, *_: object) -> None:
        self._no_memory = True

    def add(self, request: TokenRequest) -> None:
        self._texts[request.request_id] = self._tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
        self._engine.add(request)

    def step(self) -> list[TokenOutput]:
        if self._no_memory:
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        inside = "".join(self._texts.values())
        if KILLS in inside:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in inside:
            time.sleep(3600)
        return [self._spoil(output) for output in self._engine.step()]

    def _spoil(self, output: TokenOutput) -> TokenOutput:
        if output.finish_reason is None:
            return output
        text = self._texts.pop(output.request_id, "")
        if FLOODS in text:
            (token,) = self._tokenizer.encode("e", add_special_tokens=False).ids
            return dataclasses.replace(output, token_ids=(token,) * int(os.environ["HARSH_FLOOD"]))
        if GARBLES in text:
            (lead,) = [index for piece, index in self._tokenizer.get_vocab().items() if piece == "ÿ"]  # byte-level BPE's 0xFF
            return dataclasses.replace(output, token_ids=(lead,) * 3)
        if SAYS_NOTHING in text:
            return dataclasses.replace(output, token_ids=(), finish_reason="stop", stop_detail="eos")
        return output


def main() -> int:
    """Be a rank."""
    serve, run_engine = rank.serve, rank._run_engine

    def run_harshly(options: Any, *rest: Any) -> None:
        rank.serve = lambda engine, pipe: serve(HarshEngine(engine, options.model_path), pipe)
        run_engine(options, *rest)

    rank._run_engine = run_harshly
    return rank.main()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
