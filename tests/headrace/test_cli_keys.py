"""`keys`, `retry` and `delete` against a real database, a real server, and a real terminal where one is asked for."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_api import LiveApi, work
from servers import RedisServer

from headrace.broker import Broker, make_celery
from headrace.cli import main
from headrace.errors import Conflict, StoreUnavailable
from headrace.login import login_of, path_in
from headrace.settings import Settings, get_settings
from headrace.store import Role, Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test reads the environment anew, in a directory where no stack runs."""
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_key_is_made_shown_once_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "keys", "create", "ci", "--max-prompts", "100", "--max-batches", "3", "--weight", "2", "--max-priority", "0"
    )
    key = out.strip()
    assert code == 0
    assert key not in err
    with Store(f"sqlite:///{tmp_path}/.headrace/headrace.db") as store:
        found = store.keys.authenticate(key)
    assert found is not None
    assert (found.max_active_prompts, found.max_active_batches, found.weight, found.role) == (100, 3, 2, Role.USER)
    assert found.max_priority == 0
    assert run(capsys, "keys", "create", "ci")[0] == 1
    code, out, _ = run(capsys, "keys", "create", "boss", "--admin", "--json")
    boss = json.loads(out)
    assert boss["role"] == "admin"
    code, out, _ = run(capsys, "keys", "list")
    assert (code, "ci" in out, "100" in out, boss["prefix"] in out) == (0, True, True, True)
    assert key not in out
    assert boss["key"] not in out
    assert run(capsys, "keys", "revoke", "nobody")[0] == 1
    assert run(capsys, "keys", "revoke", "ci")[0] == 0
    assert run(capsys, "keys", "revoke", boss["id"], "--json")[0] == 0
    assert json.loads(run(capsys, "keys", "list", "--json")[1]) == []
    both = json.loads(run(capsys, "keys", "list", "--all", "--json")[1])
    assert [row["name"] for row in both if row["revoked_at"]] == ["ci", "boss"]
    assert all("hash" not in row for row in both)


def test_keys_are_in_the_database_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    assert run(capsys, "keys", "create", "ci", "--database-url", url)[0] == 0
    assert [row["name"] for row in json.loads(run(capsys, "keys", "list", "--json", "--database-url", url)[1])] == ["ci"]
    assert run(capsys, "keys", "create", "x\ny", "--database-url", url)[0] == 2


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path}/db", create=True) as store:
        yield store


@pytest.fixture
def url(store: Store, redis_server: RedisServer, tmp_path: Path) -> Iterator[str]:
    settings = Settings(model="echo", database_url=f"sqlite:///{tmp_path}/db", redis_url=redis_server.url)
    broker = Broker(make_celery(settings))
    with LiveApi(settings, store=store, broker=broker) as live:
        yield live.url
    broker.close()


def finished(store: Store) -> str:
    from headrace.config import GenerationConfig

    batch = store.create_batch(["a", "b", "c"], GenerationConfig(), model="echo")
    work(store, failing=[1])
    return batch.id


def test_retry_computes_failed_rows_alone(store: Store, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    old = finished(store)
    code, out, _ = run(capsys, "retry", old, "--url", url, "--json")
    assert code == 0
    new = json.loads(out)
    assert (new["request_counts"]["total"], new["metadata"]) == (1, {"retry_of": old})
    code, _, err = run(capsys, "retry", new["id"], "--url", url)
    assert code == 1
    assert "in_progress" in err


def test_where_a_key_is_asked_for_the_command_line_says_how_it_takes_one(
    store: Store, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = store.keys.create("ci")
    for wrong in ((), ("--api-key", "hr_wrong")):
        code, _, err = run(capsys, "submit", "--prompt", "a", "--url", url, *wrong)
        assert (code, "HEADRACE_API_KEY" in err) == (1, True)
    assert run(capsys, "submit", "--prompt", "a", "--url", url, "--api-key", made.text)[0] == 0


def test_names_that_stay_behind_are_spoken_of(
    store: Store, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts of a small file travel in the request, which has no names: who doesn't wait gets the answers by index."""
    (tmp_path / "named.jsonl").write_text('{"prompt": "a", "custom_id": "x"}\n')
    code, _, err = run(capsys, "submit", "named.jsonl", "--url", url)
    assert (code, "custom_id" in err) == (0, True)
    (tmp_path / "plain.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = run(capsys, "submit", "plain.jsonl", "--url", url)
    assert (code, err) == (0, "")
    assert len(store.list_batches()) == 2


def test_delete_deletes_nothing_unless_it_is_told_to(store: Store, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    old = finished(store)
    code, _, err = run(capsys, "delete", old, "--url", url)
    assert (code, "--yes" in err) == (2, True)
    running = json.loads(run(capsys, "retry", old, "--url", url, "--json")[1])["id"]
    code, _, err = run(capsys, "delete", old, running, "--yes", "--url", url)
    assert (code, running in err) == (1, True)
    assert run(capsys, "delete", old, "batch_" + "0" * 32, "--yes", "--url", url)[0] == 1
    assert len(store.list_batches()) == 2, "one that can't be deleted keeps all"
    code, out, _ = run(capsys, "delete", old, "--yes", "--json", "--url", url)
    assert (code, json.loads(out)) == (0, [{"id": old, "deleted": True}])
    assert [batch.id for batch in store.list_batches()] == [running]
    with pytest.raises(Conflict):
        store.delete_batch(running)


@pytest.mark.parametrize(("typed", "is_kept"), [("y\n", False), ("\n", True), ("no\n", True)])
def test_delete_asks_on_a_terminal(store: Store, url: str, typed: str, is_kept: bool) -> None:
    old = finished(store)
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    command = [sys.executable, "-m", "headrace.cli", "delete", old, "--url", url]
    done: Any = subprocess.run(command, cwd=ROOT, stdin=theirs, capture_output=True, text=True, timeout=60, check=False)
    os.close(ours)
    os.close(theirs)
    assert "2 answers, 1 errors" in done.stderr
    assert "[y/N]" in done.stderr
    assert bool(store.list_batches()) is is_kept
    assert done.returncode == (1 if is_kept else 0)


def test_no_password_is_told_by_what_is_printed_of_settings_and_urls() -> None:
    url = "postgresql://me@127.0.0.1:1/db?password=hidden&connect_timeout=1"
    settings = Settings(api_key="hidden", redis_url="redis://:hidden@127.0.0.1", database_url=url)
    assert "hidden" not in repr(settings)
    with Store(url) as store, pytest.raises(StoreUnavailable) as refused:
        store.ping()
    assert "127.0.0.1:1" in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_a_made_login_is_its_owners_alone_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWER_BASIC_AUTH", raising=False)
    login = login_of(tmp_path)
    user, _, password = login.partition(":")
    assert (user, len(password)) == ("headrace", 24)
    assert path_in(tmp_path).stat().st_mode & 0o777 == 0o600
    path_in(tmp_path).chmod(0o644)
    assert login_of(tmp_path) == login
    assert path_in(tmp_path).stat().st_mode & 0o777 == 0o600
    path_in(tmp_path).write_text("\n")
    assert login_of(tmp_path) not in ("", login)
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "me:mine")
    assert login_of(tmp_path) == "me:mine"
