"""The command line without a stack: parsing, exit codes, messages; what needs servers is in test_stack and test_job."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from servers import free_port

from headrace import __version__
from headrace.batch import Batch, BatchStatus, RequestCounts
from headrace.cli import console, main, parser
from headrace.cli.batches import exit_code, refuse_bad_rows, wait_with_progress, write_results
from headrace.cli.doctor import _server as find_server
from headrace.cli.doctor import _spool as find_spool
from headrace.cli.options import check_output, read_object, server_url
from headrace.cli.up import hide_password
from headrace.completion import Choice, Completion, CompletionError, TokenUsage
from headrace.config import GenerationConfig
from headrace.dataset import read_rows
from headrace.errors import InvalidRequest
from headrace.settings import get_settings
from headrace.stack import find_redis, redis_trouble

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "demo",
    "up",
    "run",
    "submit",
    "status",
    "results",
    "cancel",
    "retry",
    "delete",
    "keys",
    "worker",
    "api",
    "migrate",
    "bench",
    "doctor",
)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test reads the environment anew, in a directory where no stack runs."""
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"headrace {__version__}\n"


def test_a_command_line_loads_no_more_than_it_needs() -> None:
    """`headrace status` in a loop is common, and SQL alone takes three times as long to load as the rest."""
    heavy = ("torch", "sqlalchemy", "alembic", "celery", "fastapi", "pydantic", "httpx", "rich")
    code = f"import sys, headrace.cli; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["run", "in.jsonl"],
        ["demo", "--max-new-tokens", "0"],
        ["up", "--worker-concurrency", "-1"],
        ["up", "--port", "99999"],
        ["api", "--port", "-1"],
        ["status", "--limit", "-1"],
        ["status", "--limit", "0"],
        ["cancel"],
    ],
)
def test_a_malformed_command_line_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: headrace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nowhere.jsonl", "-o", "out"], 1, "nowhere.jsonl can't be read"),
        (["run", "in.jsonl", "-o", "out", "--gen-config", "{bad"], 2, "--gen-config is not JSON"),
        (["run", "in.jsonl", "-o", "out", "--gen-config", "[]"], 2, "must be a JSON object"),
        (["run", "in.jsonl", "-o", "out", "--gen-config", "@nowhere"], 2, "nowhere can't be read"),
        (["run", "in.jsonl", "-o", "out", "--gen-config", '{"top_p": 3}'], 2, "top_p must be a number from 0 to 1"),
        (["run", "in.jsonl", "-o", "out", "--gen-config", '{"tpo_p": 1}'], 2, "no field 'tpo_p'"),
        (["run", "in.jsonl", "-o", "out", "--engine-config", '{"tp": 0}'], 2, "tp must be"),
        (["submit"], 2, "nothing to send"),
        (["submit", "--prompt", "x", "-o", "out"], 2, "-o needs --wait"),
        (["submit", "in.jsonl"], 2, "because of line 2: the row is not JSON (column 1: Expecting value)"),
        (["submit", "--prompt", "x", "--idempotency-key", "é"], 2, "idempotency_key must be"),
        (["submit", "--prompt", "x", "--api-key", "a\nb"], 2, "api_key has a line break"),
        (["submit", "--prompt", "x", "--url", "localhost:8000"], 2, "must begin with http:// or https://"),
        (["run", "in.jsonl", "-o", "./in.jsonl"], 2, "is the input"),
        (["run", "in.jsonl", "-o", "."], 2, "is a directory"),
        (["submit", "in.jsonl", "--wait", "-o", "in.jsonl"], 2, "is the input"),
        (["demo", "--prompts", "in.jsonl", "-o", "in.jsonl"], 2, "is the input"),
        (["results", "batch_0", "-o", "."], 2, "is a directory"),
        (["submit", "--prompt", "x", "--wait", "-o", "in.jsonl/answers/out"], 2, "can't be made"),
        (["up", "--redis-url", "redis://host:port"], 2, "--redis-url must be a URL"),
        (["bench", "nonsense"], 1, "there is no benchmark 'nonsense'"),
    ],
)
def test_errors_are_one_line_with_the_remedy(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('"good"\nbroken\n')
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert error.startswith(f"headrace {arguments[0]}: ")


def test_lines_that_are_wrong_in_one_way_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    own = ['{"prompt": "x", "gen_config": {"n": 2}}'] * 7
    Path("in.jsonl").write_text("\n".join(['"good"', *own[:3], "broken", *own[3:]]))
    assert main(["submit", "in.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "because of lines 2, 3, 4, 6, 7 and 2 more: gen_config can't differ" in error
    assert "; line 5: the row is not JSON" in error
    assert error.count("gen_config can't differ") == 1


def test_a_setting_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HEADRACE_MODLE", "x")
    (Path.cwd() / "in.jsonl").write_text('"x"\n')
    assert main(["run", "in.jsonl", "-o", "out"]) == 2
    assert "HEADRACE_MODLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEADRACE_LOG_LEVEL", "loud"),
        ("HEADRACE_CHUNK_SIZE", "257"),
        ("HEADRACE_LEASE_S", "nan"),
        ("HEADRACE_REDIS_URL", "redis://me:hidden@host:port/0"),
        ("HEADRACE_REDIS_URL", "amqp://host"),
    ],
)
@pytest.mark.parametrize("command", ["api", "worker", "doctor"])
def test_a_setting_that_can_not_be_stops_a_service_before_it_starts(
    command: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main([command]) in (1, 2)
    shown = capsys.readouterr()
    assert name in shown.out + shown.err
    assert "hidden" not in shown.out + shown.err
    assert "bug" not in shown.err


@pytest.mark.parametrize("command", ["api", "worker"])
def test_a_service_finds_the_paths_that_were_meant_where_it_was_started(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It runs in the checkout's root: a relative path would lead elsewhere, and api and worker would not meet."""
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HEADRACE_MODEL", "model")
    monkeypatch.setenv("HEADRACE_DATABASE_URL", "sqlite:///data/x.db")
    became: list[dict[str, str]] = []
    monkeypatch.setattr("headrace.cli.services.become", lambda _, environ: became.append(environ))
    assert main([command]) == 0
    assert became[0]["HEADRACE_MODEL"] == str(tmp_path / "model")
    assert became[0]["HEADRACE_DATABASE_URL"].endswith(f":///{tmp_path}/data/x.db")
    monkeypatch.setenv("HEADRACE_DATABASE_URL", "mysql://me:hidden@host/db")
    get_settings.cache_clear()
    assert main([command]) == 2


def test_doctor_asks_redis_with_its_password_and_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    port = free_port()
    command = [
        find_redis(),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(tmp_path),
        "--save",
        "",
        "--requirepass",
        "hidden",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not is_listening(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        for password, state in (("hidden", "ok"), ("hiddenwrong", "missing")):
            get_settings.cache_clear()
            monkeypatch.setenv("HEADRACE_REDIS_URL", f"redis://:{password}@127.0.0.1:{port}/0")
            main(["doctor", "--json"])
            shown = capsys.readouterr().out
            assert {found["name"]: found["state"] for found in json.loads(shown)}["Redis"] == state
            assert "hidden" not in shown
            trouble = redis_trouble(f"redis://:{password}@127.0.0.1:{port}/0")
            assert (trouble is None) == (state == "ok")
    finally:
        server.kill()
        server.wait()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_an_unexpected_error_is_one_line_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("headrace.cli.doctor.look", explode)
    assert main(["doctor"]) == 1
    plain = capsys.readouterr().err
    assert "ZeroDivisionError: boom" in plain
    assert "Traceback" not in plain
    assert main(["--debug", "doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_server_that_is_not_there_says_what_to_start() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "headrace.cli", "status", "--url", url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert run.returncode == 1
    assert "headrace up" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_doctor_for_machines_and_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["torch"]["state"] == "ok"
    assert found["Redis"]["state"] == "ok"
    assert found["API"]["state"] == "note"


def test_doctor_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    monkeypatch.setenv("HEADRACE_DATABASE_URL", f"sqlite:///{tmp_path}/absent.db")
    monkeypatch.setenv("HEADRACE_MODEL", str(tmp_path))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    missing = [line.split()[1] for line in text.splitlines() if line.startswith("MISSING")]
    assert missing == ["model", "Redis", "database"]


@pytest.mark.parametrize(("status", "body"), [(404, "<html>"), (200, "[1]"), (404, '{"detail": "no"}'), (200, "{}"), (500, "")])
def test_doctor_tells_our_api_from_another_server(status: int, body: str) -> None:
    """Something else may listen on the port, or the URL may have a path too many."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        found = find_server(f"http://127.0.0.1:{server.server_port}")
    assert found.state == "note"
    assert "no headrace" in found.detail


def test_doctor_shows_a_spool_that_is_not_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADRACE_SPOOL_DIR", str(tmp_path))
    (tmp_path / "gpu_host_1.spool").write_bytes(bytes(3 << 20))
    main(["doctor", "--json"])
    [found] = [finding for finding in json.loads(capsys.readouterr().out) if finding["name"] == "spool"]
    assert found["state"] == "note"
    assert "1 files with 3.0 MiB" in found["detail"]
    monkeypatch.delenv("HEADRACE_SPOOL_DIR")
    get_settings.cache_clear()
    # As `up` does: where no folder is named, it is that of the stack.
    (tmp_path / "spool").mkdir()
    (tmp_path / "gpu_host_1.spool").rename(tmp_path / "spool" / "gpu_host_1.spool")
    assert find_spool(tmp_path).detail.startswith("1 files with 3.0 MiB")


def test_doctor_shows_the_engines_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path
) -> None:
    monkeypatch.setenv("HEADRACE_MODEL", str(tiny_model_dir))
    monkeypatch.setenv("HEADRACE_ENGINE_CONFIG", '{"num_gpu_blocks": 9, "session_len": 256}')
    assert main(["doctor", "--engine", "--json"]) == 0
    found = {finding["name"]: finding["detail"] for finding in json.loads(capsys.readouterr().out)}
    assert "float32 on cpu" in found["engine"]
    assert "9 blocks, 576 tokens" in found["memory"]


def test_migrate_makes_the_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from headrace.store import open_store

    url = f"sqlite:///{tmp_path}/new.db"
    run = subprocess.run(
        [sys.executable, "-m", "headrace.cli", "migrate"],
        env={**os.environ, "HEADRACE_DATABASE_URL": url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    open_store(url).close()


def test_bench_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    names = capsys.readouterr().out.split()
    assert {"engine", "kernels", "million", "service"} <= set(names)
    assert names == sorted(names)
    # What runs nothing by itself is no benchmark.
    assert not {"measuring", "ledger", "service_ground"} & set(names)


def test_the_folder_of_the_answers_is_there_before_the_work(tmp_path: Path) -> None:
    """A batch of hours must not end at a folder that nobody made; `run` makes it, too."""
    check_output(tmp_path / "new" / "folder" / "out.jsonl")
    assert (tmp_path / "new" / "folder").is_dir()


def test_objects_come_from_text_or_file(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"top_k": 3}')
    assert read_object("--x", None) == {}
    assert read_object("--x", '{"a": 1}') == {"a": 1}
    assert read_object("--x", f"@{tmp_path}/c.json") == {"top_k": 3}


def test_a_client_finds_the_stack_on_its_state_directory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    arguments = ["status", "--state-dir", str(state)]
    assert server_url(parser().parse_args(arguments)) == "http://127.0.0.1:8000"
    (state / "stack.json").write_text(json.dumps({"api": "http://127.0.0.1:9"}))
    assert server_url(parser().parse_args(arguments)) == "http://127.0.0.1:9"
    assert server_url(parser().parse_args([*arguments, "--url", "http://x/"])) == "http://x"


def test_bad_rows_are_named_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(["bad"] * 7 + ['"good"']))
    with pytest.raises(
        InvalidRequest, match=r"because of lines 1, 2, 3, 4, 5 and 2 more: the row is not JSON \(column 1: [^;]*\)$"
    ):
        refuse_bad_rows(read_rows(path))
    # Each breaks off at another column.
    path.write_text("\n".join("[" + "1" * number for number in range(1, 8)))
    with pytest.raises(InvalidRequest, match=r"because of line 1: .*; line 5: [^;]*; and 2 other reasons$"):
        refuse_bad_rows(read_rows(path))


def test_results_are_written_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    choice = Choice(index=0, text="né 🙂", token_ids=(1,), finish_reason="stop")
    good = Completion(index=0, choices=(choice,), usage=TokenUsage(prompt_tokens=2, completion_tokens=1))
    bad = Completion(index=1, error=CompletionError(code="kv_capacity", message="too long"))

    def broken():
        yield good
        raise ConnectionError

    with pytest.raises(ConnectionError):
        write_results(path, broken())
    assert path.read_text() == "old"
    assert write_results(path, [good, bad], ["first", None]) == 2
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (first["custom_id"], first["text"]) == ("first", "né 🙂")
    assert second == {"index": 1, "error": {"code": "kv_capacity", "message": "too long"}}
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("status", "completed", "code"),
    [(BatchStatus.COMPLETED, 2, 0), (BatchStatus.COMPLETED, 0, 1), (BatchStatus.CANCELLED, 2, 1), (BatchStatus.EXPIRED, 2, 1)],
)
def test_the_exit_code_says_whether_there_are_answers(status: BatchStatus, completed: int, code: int) -> None:
    counts = RequestCounts(total=2, completed=completed, failed=2 - completed)
    batch = Batch(
        id="b", model="m", gen_config=GenerationConfig(), status=status, counts=counts, usage=TokenUsage(), created_at=0
    )
    assert exit_code(batch) == code


def test_an_interrupted_wait_says_that_the_batch_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever presses Ctrl-C over a batch of hours wonders whether it is lost."""

    class Interrupted:
        def get(self, _: str) -> Batch:
            raise KeyboardInterrupt

    batch = Batch(
        id="batch_1", model="m", gen_config=GenerationConfig(), status=BatchStatus.IN_PROGRESS, counts=RequestCounts(total=2),
        usage=TokenUsage(), created_at=0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        wait_with_progress(Interrupted(), batch)  # type: ignore[arg-type]  # all of a client that is asked for
    told = capsys.readouterr().err
    assert "batch_1 goes on" in told
    assert "headrace status batch_1 --wait" in told
    assert "headrace cancel batch_1" in told


def test_passwords_are_not_shown() -> None:
    assert hide_password("postgresql+psycopg://me:secret@host/db") == "postgresql+psycopg://me:***@host/db"
    assert hide_password("redis://:s@cret@host:6379/0") == "redis://:***@host:6379/0"
    assert hide_password("redis://host:6379/0") == "redis://host:6379/0"
    assert hide_password("postgresql://host/db?password=s%40cret&x=1") == "postgresql://host/db?password=***&x=1"
    assert hide_password("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    with console.progress("rows", 2) as bar:
        bar.update(1, note="5 tok/s")
        bar.update(1, note="5 tok/s")
        bar.update(2)
    assert capsys.readouterr().err.splitlines() == ["rows: 1/2 · 5 tok/s", "rows: 2/2"]


def test_progress_on_a_terminal_shows_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets are markup to rich: of a file called x[red].jsonl a part was missing, and x[/] ended the command."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with console.progress("x[/] [red]", 2) as bar:
        bar.update(2, note="[bold] [/]")
    assert "x[/] [red]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(None, "?"), (3.21, "3.2 s"), (42.4, "42 s"), (245, "4 min 5 s"), (7380, "2 h 3 min")]
)
def test_durations_read_well(value: float | None, text: str) -> None:
    assert console.seconds(value) == text


def test_moments_are_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        assert console.moment(1_700_000_000) == "2023-11-15 00:13"
    finally:
        monkeypatch.undo()
        time.tzset()
