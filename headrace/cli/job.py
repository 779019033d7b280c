"""`headrace run`: an offline dataset job in this process. How it is made resumable stands in `headrace.job`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli import console, options
from headrace.cli.up import interrupted_once
from headrace.errors import EngineError

if TYPE_CHECKING:
    from headrace.job import JobProgress, JobResult, JobSpec

EXAMPLE = """Rows of INPUT are a JSON string, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with an optional
custom_id. Rows of OUTPUT, in the same order, have index, custom_id, text, finish_reason, prompt_tokens, cached_tokens and
completion_tokens, or an error. Killed and started again, the same command computes only what is missing."""

MOST_OF_A_MESSAGE = 300
"""Characters of an error that are shown; all of it is in the output."""


def add_commands(commands: Any) -> None:
    """Add `run`."""
    command = commands.add_parser(
        "run", help="answer every row of a JSONL file, no server needed; resumable", description=EXAMPLE
    )
    command.add_argument("input", type=Path, help="JSONL file with one prompt a line")
    command.add_argument("-o", "--output", type=Path, required=True, help="JSONL file for the answers")
    command.add_argument("--model", help="a Hugging Face directory, a hub id or 'smollm2' (default: HEADRACE_MODEL)")
    options.add_gen_config(command)
    command.add_argument("--engine-config", metavar="JSON", help="fields of PytorchEngineConfig as a JSON object, or @FILE")
    command.add_argument(
        "--chat-template", metavar="NAME|JSON|FILE", help="a template's name, or the fields of ChatTemplateConfig"
    )
    command.add_argument("--restart", action="store_true", help="throw away what an earlier run for this output computed")
    options.add_json(command)
    command.set_defaults(run=run, interrupted="interrupted; the same command goes on where this one stopped")


def run(arguments: argparse.Namespace) -> int:
    """Run the job; 1 when not one row has an answer."""
    from headrace.config import ChatTemplateConfig
    from headrace.job import JobEngine, JobSpec, run_job
    from headrace.settings import get_settings

    options.check_output(arguments.output, source=arguments.input)
    settings = get_settings()
    template = arguments.chat_template
    is_fields = template is not None and (template.lstrip().startswith("{") or template.endswith(".json"))
    spec = JobSpec(
        input=arguments.input,
        output=arguments.output,
        model=arguments.model or settings.model,
        gen_config=options.gen_config(arguments),
        engine_config=options.engine_config(arguments.engine_config or settings.engine_config),
        chat_template_config=None
        if template is None
        else (ChatTemplateConfig.from_json(template) if is_fields else ChatTemplateConfig(template)),
        restart=arguments.restart,
    )

    # A pipeline that nobody holds closes its engine.
    held: list[object] = []

    def open_engine() -> JobEngine:
        console.say(f"loading {spec.model}")
        pipe = load(spec)
        held.append(pipe)
        frontend: JobEngine = pipe.frontend
        return frontend

    with interrupted_once(), console.progress("rows", 1) as bar:

        def report(moment: JobProgress) -> None:
            bar.update(moment.done, total=moment.total, note=note(moment))

        result = run_job(spec, open_engine, report=report, say=console.say)
    show(spec.output, result, as_json=arguments.json)
    counts = result.batch.counts
    return 1 if counts.failed == counts.total else 0


def load(spec: JobSpec) -> Any:
    """Start the engine in a process of its own and return its pipeline (whose class this floor does not know)."""
    from headrace.offline import pipeline

    config, template = spec.engine_config, spec.chat_template_config
    try:
        return pipeline(spec.model, backend_config=config, chat_template_config=template, log_level="WARNING")
    except ImportError as error:
        raise EngineError(str(error)) from error


def note(moment: JobProgress) -> str:
    """Return the rate, the failures and the time left."""
    failed = f" · {moment.failed} failed" if moment.failed else ""
    return f"{moment.tokens_per_second:.0f} tok/s{failed} · {console.seconds(moment.eta_s)} left"


def show(output: Path, result: JobResult, *, as_json: bool) -> None:
    """Print what came of the job."""
    batch, moment = result.batch, result.progress
    if as_json:
        console.out_json(
            {
                "output": str(output),
                "rows": batch.counts.total,
                "failed": batch.counts.failed,
                "failures": {code: one._asdict() for code, one in result.failures.items()},
                "computed": moment.done - moment.resumed,
                "prompt_tokens": batch.usage.prompt_tokens,
                "cached_tokens": batch.usage.cached_tokens,
                "completion_tokens": batch.usage.completion_tokens,
                "elapsed_s": round(moment.elapsed_s, 3),
            }
        )
        return
    failed = f", {batch.counts.failed} of them with an error" if batch.counts.failed else ""
    console.say(
        f"{output}: {batch.counts.total} rows{failed}; {batch.usage.prompt_tokens} prompt and {batch.usage.completion_tokens} "
        f"generated tokens; this run computed {moment.done - moment.resumed} rows in {console.seconds(moment.elapsed_s)}"
    )
    for code, one in result.failures.items():
        console.say(f"{one.rows} x {code}, the first in line {one.line} of the input: {one.message[:MOST_OF_A_MESSAGE]}")
