"""Kills writers of one SQLite store in the middle of their commits: `sqlite_victims.py URL KILLS SEED`.

A child writes rows as fast as it can and tells over a pipe when a commit begins (`c`), when it is over (`d`), and which rows the store
has acknowledged (`a START STOP`). A thread of the child sends it SIGKILL a moment after some `c`: from outside it would come too late,
a commit takes a tenth of a millisecond. The parent goes on until KILLS children died between their `c` and their `d`, looks at the file
now and then, and prints its counts as JSON; rows that were acknowledged and are gone raise AssertionError. It holds no connection while
it forks: a child that closes its copy would drop the parent's locks.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

from sqlalchemy import event
from store_driver import answer, send

from headrace.store import Store

ROWS_IN_ONE = 3
CHECK_EVERY = 20


def write_until_killed(url: str, tell: int, *, fatal: int, delay_s: float) -> None:
    """Work chunks off, a few rows to a transaction; die `delay_s` after the `fatal`-th commit has begun."""
    begun = threading.Event()
    commits = itertools.count(1)

    def kill() -> None:
        begun.wait()
        until = time.perf_counter() + delay_s
        while time.perf_counter() < until:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    def on_commit(_: object) -> None:
        os.write(tell, b"c\n")
        if next(commits) == fatal:
            begun.set()

    threading.Thread(target=kill, daemon=True).start()
    with Store(url) as store:
        writer = store._database.writer
        event.listen(writer, "commit", on_commit)
        event.listen(writer, "checkin", lambda *_: os.write(tell, b"d\n"))
        while True:
            for ref in send(store, limit=2):
                claim = store.claim_chunk(ref.chunk_id, worker="victim", lease_s=0.2)
                if claim is None:
                    continue
                indexes = [item.index for item in store.pending(claim)]
                for start in range(0, len(indexes), ROWS_IN_ONE):
                    part = indexes[start : start + ROWS_IN_ONE]
                    store.record(claim, [answer(index) for index in part])
                    os.write(tell, b"a %d %d\n" % (part[0], part[-1] + 1))
                store.finish_chunk(claim)
            time.sleep(0.01)


def lines_of(reader: int) -> Iterator[bytes]:
    """Yield what a child says, until it is dead."""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        rest = b""
        while data := pipe.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def kill_one(url: str, dice: random.Random) -> tuple[bool, set[int]]:
    """Return whether the child died inside a commit, and the indexes that were acknowledged to it."""
    reader, tell = os.pipe()
    fatal, delay_s = dice.randrange(4, 24), dice.uniform(0, 0.0004)
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            write_until_killed(url, tell, fatal=fatal, delay_s=delay_s)
        finally:
            os._exit(1)
    os.close(tell)
    acknowledged: set[int] = set()
    last = b""
    for line in lines_of(reader):
        if line.startswith(b"a"):
            acknowledged.update(range(*map(int, line.split()[1:])))
        else:
            last = line
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"the writer ended by itself: {status}"
    return last == b"c", acknowledged


def look_at(path: str, acknowledged: set[int]) -> None:
    """Raise AssertionError when the file is damaged or an acknowledged row is gone."""
    with closing(sqlite3.connect(path, timeout=30)) as link:
        verdict = link.execute("PRAGMA integrity_check").fetchone()[0]
        assert verdict == "ok", verdict
        there = {index for (index,) in link.execute('SELECT "index" FROM completions')}
    assert not acknowledged - there, f"{len(acknowledged - there)} acknowledged rows are gone"


def main(url: str, kills: int, seed: int) -> None:
    dice = random.Random(seed)
    acknowledged: set[int] = set()
    inside, tries = 0, 0
    while inside < kills:
        tries += 1
        assert tries <= 10 * kills, f"only {inside} of {tries} kills met a commit"
        was_inside, rows = kill_one(url, dice)
        inside += was_inside
        acknowledged |= rows
        if tries % CHECK_EVERY == 0:
            look_at(url.removeprefix("sqlite:///"), acknowledged)
    look_at(url.removeprefix("sqlite:///"), acknowledged)
    print(json.dumps({"kills": tries, "kills_inside_a_commit": inside, "rows_acknowledged_to_victims": len(acknowledged)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
