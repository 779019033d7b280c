"""Prompts that do the engine harm, among innocent ones: each gets its own end, and nobody else pays for it.

☠ kills the process · ⏳ hangs · 🌊 answers with ten million characters (a million in the short form) · 💥 with bytes that are no UTF-8 · 🤐 with no token
an empty prompt · half a surrogate pair in the request · n=0
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
from harsh_engine import FLOODS, GARBLES, HANGS, KILLS, SAYS_NOTHING
from tiny_service import ENGINE, TinyService
from worker_process import QUICK

from headrace.batch import BatchStatus
from headrace.completion import Completion
from headrace.config import GenerationConfig

TITLE = "poison: prompts that kill, hang, flood, garble, say nothing; n=0"
GREEDY: Final = GenerationConfig(max_new_tokens=6, ignore_eos=True, temperature=0.0)
WATCHDOG_S: Final = 2.0
MOST_DEATHS: Final = 3
"""Engines that one poison prompt may cost."""
WORDS: Final = ("the", "mill", "wheel", "turns", "while", "water", "runs", "down", "the", "headrace")


def run(*, long: bool, seed: int, say: Callable[[str], None]) -> dict[str, int | float]:
    """Sow poison among innocent prompts, in the long form dozens of each, many of them side by side."""
    rows, flood = (2000, 10**7) if long else (60, 10**6)
    few = {
        KILLS: 1,
        HANGS: 0,
        FLOODS: 1,
        GARBLES: 2,
        SAYS_NOTHING: 2,
    }  # one that hangs costs seconds, and is in test_supervisor.py
    each = {KILLS: 20, HANGS: 4, FLOODS: 2, GARBLES: 20, SAYS_NOTHING: 20} if long else few
    draw = random.Random(seed)
    prompts, sown = _sow(draw, rows, each)
    folder = Path(tempfile.mkdtemp(prefix="headrace-fault-"))
    folder.chmod(0o711)
    with TinyService(
        folder, database="postgres" if long else "sqlite", engine={**ENGINE, "max_batch_size": 16},
        environ={"HARSH_WATCHDOG_S": str(WATCHDOG_S), "HARSH_FLOOD": str(flood)}, engine_frontend="harsh_engine:HarshFrontend", **{**QUICK, "chunk_size": 16},
    ) as tiny:  # fmt: skip
        refused = _refused_at_the_door(tiny)
        wanted = _answers(tiny, [text for index, text in enumerate(prompts) if index not in sown])
        started = time.monotonic()
        got = _answers(tiny, prompts, say=say)
        seconds = time.monotonic() - started
        log = tiny.worker.log_tail(10**8)
        assert tiny.worker.process is not None
        assert tiny.worker.process.poll() is None, "the worker ended"
    blamed = _judge(got, wanted, sown, flood)
    deaths, guilty = log.count("[engine_died]"), blamed[KILLS] + blamed[HANGS]
    assert log.count("[poison_prompt]") == guilty
    assert deaths <= MOST_DEATHS * guilty, f"{deaths} engines died of {guilty} prompts"
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "rows": len(prompts), "lost": 0, "doubled": 0, "innocents_blamed": 0, "poison": guilty, "engine_deaths": deaths,
        "deaths_each": round(deaths / guilty, 2), "flooded": blamed[FLOODS], "garbled": blamed[GARBLES],
        "without_token": blamed[SAYS_NOTHING], "empty": blamed[""], "refused_at_the_door": refused, "found_s": round(seconds, 1),
    }  # fmt: skip


def _sow(draw: random.Random, rows: int, each: dict[str, int]) -> tuple[list[str], dict[int, str]]:
    """Return the prompts, and what kind each harmful one is by its index; half of the killers stand side by side."""
    prompts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 20))) for _ in range(rows)]
    killers = each[KILLS] // 2
    first = draw.randrange(rows - killers)
    sown = dict.fromkeys(range(first, first + killers), KILLS)
    rest = [sign for sign, count in each.items() for _ in range(count - killers * (sign == KILLS))] + [""] * 3
    for index, sign in zip(draw.sample([index for index in range(rows) if index not in sown], len(rest)), rest, strict=True):
        sown[index] = sign
    for index, sign in sown.items():
        prompts[index] = f"{prompts[index]} {sign}" if sign else ""
    return prompts, sown


def _answers(tiny: TinyService, prompts: list[str], *, say: Callable[[str], None] = lambda _: None) -> list[Completion]:
    batch_id = tiny.client.submit(prompts, GREEDY).id
    batch = tiny.service.wait_over(batch_id, tiny.worker, timeout_s=900)
    assert batch.status is BatchStatus.COMPLETED
    say(f"{batch.counts.completed} answered, {batch.counts.failed} with an error")
    rows = tiny.service.assert_exactly_once(batch_id, len(prompts))
    assert sum(1 for _ in tiny.client.results(batch_id)) == len(prompts), "the stream isn't whole"
    assert tiny.service.store.count_in_flight(model=tiny.settings.model) == 0
    return rows


def _judge(got: list[Completion], wanted: list[Completion], sown: dict[int, str], flood: int) -> Counter[str]:
    """Check each row by its prompt's kind; return how many there are of each."""
    calm, kinds = iter(wanted), Counter(sown.values())
    for row in got:
        kind, code = sown.get(row.index), row.error and row.error.code
        if kind is None:
            assert row.error is None, f"an innocent prompt is blamed: {row}"
            assert row.choices[0].token_ids == next(calm).choices[0].token_ids, f"index {row.index} has another answer"
            continue
        wanted_code = {KILLS: "poison_prompt", HANGS: "poison_prompt", "": "invalid_request"}.get(kind)
        assert code == wanted_code, f"{kind!r}: {row.error}"
        if kind == FLOODS:
            assert len(row.choices[0].text) == flood
        if kind == GARBLES:
            assert row.choices[0].text == "\ufffd" * 3
        if kind == SAYS_NOTHING:
            assert (row.choices[0].text, row.usage.completion_tokens, row.choices[0].finish_reason) == ("", 0, "stop")
    return kinds


def _refused_at_the_door(tiny: TinyService) -> int:
    """What no row can be made of is refused as a whole: nothing is stored."""
    bodies: list[Any] = [
        json.dumps({"prompts": ["a"], "gen_config": {"n": 0}}).encode(),
        b'{"prompts": ["a", "\\ud83d"]}',
        b'{"prompts": ["a", "\xf0\x9f"]}',
    ]
    for body in bodies:
        reply = httpx.post(f"{tiny.url}/v1/batches", content=body, headers={"content-type": "application/json"}, timeout=30)
        assert reply.status_code == 422, reply.text
    assert list(tiny.client.list()) == []
    return len(bodies)
