"""Point 16: two pipelines in a process, reopened without a trace, called from a running loop and from eight threads.

That a GPU's memory comes back is tests/gpu/test_pipeline.py; forks, daemons and stdin are tests/headrace/test_pipeline_scripts.py.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipelines import SMALL

from engine.async_engine import AsyncEngine
from headrace import EngineError, GenerationConfig, pipeline

GREEDY = GenerationConfig(max_new_tokens=8)


def test_a_second_one_beside_the_first(pipe: AsyncEngine, tiny_model_dir: Path) -> None:
    expected: Any = pipe("water", GREEDY)
    with pipeline(str(tiny_model_dir), backend_config=SMALL) as second:
        pids = second.frontend.pids
        assert not set(pids) & set(pipe.frontend.pids)
        assert second("water", GREEDY).text == expected.text  # type: ignore[union-attr]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(EngineError, match="closed"):
        second("water", GREEDY)
    second.close()
    assert pipe("water", GREEDY).text == expected.text  # type: ignore[union-attr]


@pytest.mark.slow
def test_reopened_three_times(tiny_model_dir: Path) -> None:
    me = psutil.Process()
    left, threads, before = [], [], len(me.children())
    for _ in range(4):
        with pipeline(str(tiny_model_dir), backend_config=SMALL) as again:
            assert again("water", GREEDY).error_code is None  # type: ignore[union-attr]
        left.append((me.num_fds(), len(me.children())))
        threads.append(me.num_threads())
    # The first one loads libraries that stay; their threads come and go.
    assert left[1:] == [left[1]] * 3
    assert max(threads[1:]) <= threads[0] + 1
    assert left[1][1] == before


def test_inside_a_running_loop(pipe: AsyncEngine) -> None:
    async def main() -> None:
        called: Any = pipe("water", GREEDY)
        awaited = await pipe.async_batch_infer("water", GREEDY)
        pieces = [piece async for piece in pipe.generate("water", GREEDY)]
        assert called.text == awaited.text == "".join(piece.text for piece in pieces)

    asyncio.run(main())


def test_from_eight_threads(pipe: AsyncEngine) -> None:
    prompts = [f"thread {number}" for number in range(8)]
    expected: Any = pipe(prompts, GREEDY)
    with ThreadPoolExecutor(8) as pool:
        found: Any = list(pool.map(lambda own: pipe([own] * 6, GREEDY), prompts))
    assert [[answer.text for answer in own] for own in found] == [[answer.text] * 6 for answer in expected]
