"""`headrace demo`: the main job end to end on this machine, over the same REST, Redis, worker and SQL as in production."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli import console, options
from headrace.cli.batches import exit_code, refuse_bad_rows, wait_with_progress, write_results
from headrace.cli.up import Steps, add_stack_options, interrupted_once, spinner, stack_options
from headrace.completion import CompletionError
from headrace.config import GenerationConfig
from headrace.dataset import Row, read_rows
from headrace.stack import ROOT, Stack

if TYPE_CHECKING:
    from headrace.batch import Batch
    from headrace.completion import Completion

PROMPTS = ROOT / "examples" / "prompts.jsonl"


def add_commands(commands: Any) -> None:
    """Add `demo`."""
    command = commands.add_parser(
        "demo", help="start everything, answer a batch of real prompts, show the answers", description=__doc__
    )
    add_stack_options(command)
    command.add_argument("--prompts", type=Path, default=PROMPTS, help="a JSONL file (default: examples/prompts.jsonl)")
    command.add_argument(
        "-o", "--output", type=Path, help="where the answers go (default: demo-results.jsonl in the state directory)"
    )
    command.add_argument("--max-new-tokens", type=options.positive, default=64, help="for each prompt (default: %(default)s)")
    command.add_argument("--show", type=int, default=6, help="how many answers to print (default: %(default)s)")
    options.add_json(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the job; 1 when nothing was answered."""
    options.check_output(arguments.output, source=arguments.prompts)
    rows = list(read_rows(arguments.prompts))
    refuse_bad_rows(rows)
    output = arguments.output or arguments.state_dir / "demo-results.jsonl"
    stack = Stack(stack_options(arguments))
    started = time.monotonic()
    with interrupted_once(), spinner() as report, stack.running(report) as urls:
        ready_s = time.monotonic() - started
        report("submitting")
        batch, completions = _answer(urls.api, rows, arguments, output, report)
        total_s = time.monotonic() - started
    if arguments.json:
        from headrace.cli.batches import batch_dict

        console.out_json(
            {"batch": batch_dict(batch), "results": str(output), "ready_s": round(ready_s, 1), "total_s": round(total_s, 1)}
        )
    else:
        _show(rows, completions, arguments.show)
        _stats(batch, completions, ready_s=ready_s)
        console.out(f"\nresults   {output}\ndatabase  {stack.urls.database}\nlogs      {arguments.state_dir}/logs")
        console.out(
            "next      ./dev run up, then ./dev run submit FILE --wait; or without any server: ./dev run run FILE -o OUT"
        )
    return exit_code(batch)


def _answer(
    url: str, rows: list[Row], arguments: argparse.Namespace, output: Path, report: Steps
) -> tuple[Batch, list[Completion]]:
    from headrace.client import Client
    from headrace.settings import get_settings

    prompts = [row.prompt for row in rows if not isinstance(row.prompt, CompletionError)]
    with Client(url, api_key=get_settings().api_key or None) as client:
        batch = client.submit(
            prompts,
            GenerationConfig(max_new_tokens=arguments.max_new_tokens),
            metadata={"source": str(arguments.prompts)[-500:]},
        )
        report.stop()
        console.say(f"{len(prompts)} prompts are batch {batch.id} at {url}")
        batch = wait_with_progress(client, batch)
        completions = list(client.results(batch.id))
    write_results(output, completions, [row.custom_id for row in rows])
    return batch, completions


def _show(rows: list[Row], completions: list[Completion], count: int) -> None:
    step = max(1, len(rows) // max(1, count))
    for row, completion in list(zip(rows, completions, strict=True))[::step][:count]:
        prompt = (
            row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"] if isinstance(row.prompt, list) else ""
        )
        answer = (
            completion.choices[0].text
            if completion.choices
            else f"error: {completion.error.message if completion.error else ''}"
        )
        console.out(f"\n[{row.index}] {console.shorten(prompt, 110)}\n    {console.shorten(answer, 220)}")


def _stats(batch: Batch, completions: list[Completion], *, ready_s: float) -> None:
    usage, counts = batch.usage, batch.counts
    reasons = [completion.choices[0].finish_reason for completion in completions if completion.choices]
    lengths = sorted(completion.usage.completion_tokens for completion in completions if completion.choices) or [0]
    rows = [
        ("prompts", f"{counts.total} ({counts.completed} answered, {counts.failed} failed)"),
        ("prompt tokens", f"{usage.prompt_tokens} ({usage.cached_tokens} from the prefix cache)"),
        (
            "generated tokens",
            f"{usage.completion_tokens} (shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]})",
        ),
        ("ended by", f"{reasons.count('stop')} by themselves, {reasons.count('length')} at the token limit"),
        ("rate", "" if batch.tokens_per_second is None else f"{batch.tokens_per_second:.1f} generated tokens a second"),
        ("stack ready after", console.seconds(ready_s)),
    ]
    console.out("\n" + console.table(("TOKEN STATS", batch.model), [row for row in rows if row[1]]))
