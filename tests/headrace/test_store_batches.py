"""The store's batches, on SQLite and PostgreSQL: coming in, being read, being listed."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_driver import REFUSED, answers, check, chunk_rows, count, execute, send, submit, take, work_off

from headrace.batch import BatchStatus
from headrace.completion import Choice, Completion, CompletionError, TokenLogprobs, TokenUsage
from headrace.config import GenerationConfig
from headrace.errors import Conflict, InvalidRequest, NotFound
from headrace.store import ChunkMessage, Store
from headrace.store.tables import batches, chunks, completions, prompts

CONFIG = GenerationConfig(max_new_tokens=7, random_seed=2**64 - 1, stop_words=("\n", "é"), logit_bias={3: -1.5})
HARD = [
    "",
    " ",
    "é漢字🎉",
    "nul \x00 inside",
    "lone \ud800 surrogate",
    '"quotes" \\ \n\r\t',
    [{"role": "user", "content": "hi"}],
]


def test_a_batch_comes_back_as_it_was_asked_for(store: Store) -> None:
    batch = store.create_batch(
        ["a", "b", "c"],
        CONFIG,
        model="m",
        chunk_size=2,
        metadata={"k": "v"},
        priority=5,
        completion_window="30m",
        endpoint="/v1/x",
    )
    assert batch == store.get_batch(batch.id)
    assert (batch.status, batch.gen_config, batch.model) == (BatchStatus.IN_PROGRESS, CONFIG, "m")
    assert (batch.metadata, batch.priority, batch.endpoint, batch.completion_window) == ({"k": "v"}, 5, "/v1/x", "30m")
    assert (batch.counts.total, batch.counts.done) == (3, 0)
    assert batch.expires_at == pytest.approx(batch.created_at + 1800, abs=0.5)
    assert batch.in_progress_at is not None
    assert batch.started_at is None
    assert re.fullmatch(r"batch_[0-9a-f]{32}", batch.id)
    check(store, batch.id)


def test_prompts_of_every_kind_reach_the_worker_unchanged(store: Store) -> None:
    store.create_batch(HARD, CONFIG, model="m", chunk_size=4)
    refs = send(store)
    messages = [ChunkMessage.from_dict(store.chunk_message(ref).to_dict()) for ref in refs]
    assert [prompt for message in messages for prompt in message.prompts] == HARD
    assert {message.gen_config for message in messages} == {CONFIG}
    assert [(message.number, message.of, message.start, message.stop) for message in messages] == [(1, 2, 0, 4), (2, 2, 4, 7)]
    claims = [store.claim_chunk(ref.chunk_id, worker="w", lease_s=60) for ref in refs]
    assert [item.prompt for claim in claims if claim for item in store.pending(claim)] == HARD


def test_answers_of_every_kind_come_back_unchanged(store: Store) -> None:
    batch = submit(store, 3)
    (claim,) = take(store)
    logprobs = (TokenLogprobs(token_id=1, logprob=-0.25, top=((1, -0.25), (2, -float("inf")))),)
    given = [
        Completion(
            index=0,
            choices=tuple(
                Choice(
                    index=i,
                    text=f"\x00\ud83d {i}",
                    token_ids=(9, 8),
                    finish_reason="length",
                    stop_detail=None,
                    logprobs=logprobs,
                )
                for i in range(2)
            ),
            usage=TokenUsage(prompt_tokens=5, cached_tokens=4, completion_tokens=4),
            prompt_logprobs=logprobs * 4,
            token_texts={1: "\x00é", 2: (0xF0, 0x9F)},
            queue_ms=0.125,
            run_ms=3.5,
            attempts=2,
        ),
        Completion(index=1, error=CompletionError(code="poison_prompt", message="é \x00")),
        Completion(index=2, choices=(Choice(index=0, text="", token_ids=(), finish_reason="stop"),)),
    ]
    assert store.record(claim, given).inserted == 3
    assert store.results(batch.id) == given
    assert list(store.stream_results(batch.id, page=1)) == given


def test_refused_prompts_are_failed_rows_at_once_and_not_sent(store: Store) -> None:
    batch = submit(store, 7, refused=[0, 4, 5], chunk_size=2)
    assert (batch.counts.total, batch.counts.failed, batch.status) == (7, 3, BatchStatus.IN_PROGRESS)
    assert [(item.index, item.error) for item in store.results(batch.id)] == [(i, REFUSED) for i in (0, 4, 5)]
    refs = send(store)
    assert [ref.start for ref in refs] == [0, 2, 6], "the chunk of 4 and 5 has nothing to do"
    assert store.chunk_message(refs[0]).prompts == (None, "prompt 1")
    claims = [claim for ref in refs if (claim := store.claim_chunk(ref.chunk_id, worker="w", lease_s=60))]
    assert [item.index for item in store.pending(claims[0])] == [1]
    work_off(store, claims)
    done = check(store, batch.id)
    assert (done.status, done.counts.completed, done.counts.failed) == (BatchStatus.COMPLETED, 4, 3)


def test_a_batch_whose_every_prompt_is_refused_is_over_at_once(store: Store) -> None:
    batch = submit(store, 5, refused=range(5), chunk_size=2)
    assert batch.status is BatchStatus.COMPLETED
    assert None not in (batch.finalizing_at, batch.completed_at)
    assert send(store) == []
    check(store, batch.id)


def test_nothing_stays_of_a_batch_that_was_refused(store: Store) -> None:
    def broken() -> Iterator[str]:
        yield from (f"prompt {i}" for i in range(4500))  # two slices are committed by then
        raise OSError("the upload broke")

    with pytest.raises(OSError, match="the upload broke"):
        store.create_batch(broken(), CONFIG, model="m")
    for options, param in (({"chunk_size": 0}, "chunk_size"), ({"completion_window": "1w"}, "completion_window")):
        with pytest.raises(InvalidRequest) as refused:
            submit(store, 3, **options)
        assert refused.value.param == param
    with pytest.raises(InvalidRequest) as empty:
        submit(store, 0)
    assert empty.value.param == "prompts"
    assert [count(store, table) for table in (batches, prompts, chunks, completions)] == [0, 0, 0, 0]


def test_an_idempotency_key_stores_once(store: Store) -> None:
    first = submit(store, 5, idempotency_key="k", refused=[1])
    assert submit(store, 5, idempotency_key="k", refused=[1]).id == first.id
    assert submit(store, 5, idempotency_key="k2", refused=[1]).id != first.id
    assert len({submit(store, 5).id for _ in range(2)}) == 2
    for change in ({"refused": [2]}, {"priority": 1}, {"model": "n"}, {"gen_config": CONFIG}, {"metadata": {"a": "b"}}):
        with pytest.raises(InvalidRequest) as other:
            submit(store, 5, idempotency_key="k", **{"refused": [1], **change})  # type: ignore[arg-type]
        assert other.value.param == "idempotency_key"
    assert count(store, batches) == 4


def test_the_same_key_while_the_first_request_is_still_coming_in(store: Store) -> None:
    def prompts_and_a_second_call() -> Iterator[str]:
        yield "a"
        with pytest.raises(Conflict):
            store.create_batch(["a"], CONFIG, model="m", idempotency_key="k")

    store.create_batch(prompts_and_a_second_call(), CONFIG, model="m", idempotency_key="k")
    assert count(store, batches) == 1


def test_nobody_works_on_a_batch_that_is_still_coming_in(store: Store) -> None:
    seen = []

    def watched() -> Iterator[str]:
        for i in range(2500):
            if i in (0, 2400):
                (batch,) = store.list_batches()
                seen.append((batch.status, batch.counts.total, send(store)))
            yield f"prompt {i}"

    store.create_batch(watched(), CONFIG, model="m")
    assert seen == [(BatchStatus.VALIDATING, 0, [])] * 2
    assert sum(ref.stop - ref.start for ref in send(store)) == 2500


def test_listing_goes_from_new_to_old_page_by_page(store: Store) -> None:
    ids = [submit(store, 1).id for _ in range(5)][::-1]
    assert [batch.id for batch in store.list_batches()] == ids
    pages, after = [], None
    while page := store.list_batches(after=after, limit=2):
        pages.append([batch.id for batch in page])
        after = page[-1].id
    assert pages == [ids[:2], ids[2:4], ids[4:]]
    store.cancel_batch(ids[3])
    assert [batch.id for batch in store.list_batches(status=BatchStatus.CANCELLED)] == [ids[3]]
    with pytest.raises(NotFound):
        store.list_batches(after="batch_unknown")


def test_what_is_unknown_is_not_found(store: Store) -> None:
    for call in (store.get_batch, store.cancel_batch, store.token_stats, store.results):
        with pytest.raises(NotFound):
            call("batch_unknown")
    with pytest.raises(NotFound):
        next(store.stream_results("batch_unknown"))
    assert store.claim_chunk("chunk_unknown", worker="w", lease_s=1) is None


def test_tokens_are_summed_in_the_batch_row(store: Store) -> None:
    batch = submit(store, 10, chunk_size=4)
    work_off(store, take(store))
    want = TokenUsage()
    for item in answers(range(10)):
        want += item.usage
    assert store.token_stats(batch.id) == store.get_batch(batch.id).usage == want


def test_results_page_by_index(store: Store) -> None:
    batch = submit(store, 10, chunk_size=4)
    (first, second, third) = take(store)
    store.record(third, answers([9]))
    store.record(first, answers([1, 3]))
    assert [item.index for item in store.results(batch.id)] == [1, 3, 9]
    assert [item.index for item in store.results(batch.id, after=1, limit=1)] == [3]
    assert store.results(batch.id, after=9) == []
    store.record(second, answers([4]))
    assert [item.index for item in store.stream_results(batch.id, page=2)] == [1, 3, 4, 9]


def test_twenty_thousand_rows_come_in_and_go_out_in_flat_memory(store: Store, store_url: str) -> None:
    # In a process of its own: 40 MB of prompts and 40 MB of answers go through it.
    script = Path(__file__).parents[1] / "support" / "store_flood.py"
    done = subprocess.run([sys.executable, script, store_url, "20000", "2000"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["rows"] == 20_000
    assert report["grown_mb"] < 28, report
    batch = store.list_batches()[0]
    assert (batch.status, batch.counts.completed) == (BatchStatus.COMPLETED, 20_000)


def test_chunks_are_made_for_the_whole_batch(store: Store) -> None:
    batch = submit(store, 130, chunk_size=64)
    assert [(row.number, row.chunk_count, row.start, row.stop) for row in chunk_rows(store, batch.id)] == [
        (1, 3, 0, 64),
        (2, 3, 64, 128),
        (3, 3, 128, 130),
    ]


def test_deleting_a_batch_takes_its_rows_with_it(store: Store) -> None:
    batch = submit(store, 10, refused=[1])
    execute(store, batches.delete().where(batches.c.id == batch.id))
    assert [count(store, table) for table in (batches, prompts, chunks, completions)] == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_pages_of_rows_that_lie_far_apart_are_whole_and_in_order(store: Store, seed: int) -> None:
    """A page is read in ranges of the index that grow: none may be left out, or read twice."""
    draw = random.Random(seed)
    batch = submit(store, 3000, chunk_size=250)
    answered = sorted({*draw.sample(range(3000), 40), *draw.sample(range(1500, 1600), 60)})
    for claim in take(store):
        own = [index for index in answered if claim.start <= index < claim.stop]
        if own:
            store.record(claim, answers(own))
    for after in (-1, 0, answered[3], 1499, 1550, 2998, 2999, 10**12):
        for limit in (1, 7, 40, 1000):
            expected = [index for index in answered if index > after][:limit]
            assert [row.index for row in store.results(batch.id, after=after, limit=limit)] == expected
            assert [row.position for row in store.output_rows(batch.id, "output", after=after, limit=limit)] == expected
            assert store.output_rows(batch.id, "errors", after=after, limit=limit) == []
