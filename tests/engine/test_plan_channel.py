"""Frames reach every rank in order, whatever their size; a rank that is gone is noticed; nothing is left on the machine."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from engine import plan_channel
from engine.parallel import Rendezvous, join_store
from engine.plan_channel import PlanReceiver, PlanSender
from headrace.errors import RankLost

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plan_channel, "_folder", lambda: Path(plan_channel.tempfile.mkdtemp(dir=tmp_path)))
    return tmp_path


@pytest.fixture
def rendezvous() -> Rendezvous:
    return Rendezvous()


def opened(rendezvous: Rendezvous, size: int) -> tuple[PlanSender, list[PlanReceiver]]:
    receivers: list[PlanReceiver] = []

    def join(store: TCPStore) -> None:
        receivers.append(PlanReceiver(store))

    threads = [threading.Thread(target=join, args=(join_store(rendezvous.address),)) for _ in range(size - 1)]
    for thread in threads:
        thread.start()
    sender = PlanSender(rendezvous.store, size=size)
    for thread in threads:
        thread.join()
    return sender, receivers


def test_every_rank_gets_every_frame(folder: Path, rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_channel, "_SLOT_BYTES", 4096)
    sender, receivers = opened(rendezvous, 3)
    assert list(folder.iterdir()) == []  # nobody else can come in, and nothing outlives a kill -9
    draw = random.Random(7)
    frames = [draw.randbytes(draw.choice([0, 1, 30, 4096, 4097, 100_000])) for _ in range(500)]
    got: list[list[bytes | None]] = [[] for _ in receivers]

    def read(receiver: PlanReceiver, into: list[bytes | None]) -> None:
        while (frame := receiver.receive()) is not None:
            into.append(frame)

    threads = [threading.Thread(target=read, args=pair) for pair in zip(receivers, got, strict=True)]
    for thread in threads:
        thread.start()
    for frame in frames:
        sender.send(frame)
    until = time.monotonic() + 20
    while any(len(one) < len(frames) for one in got) and time.monotonic() < until:
        time.sleep(0.01)
    sender.close()
    sender.close()
    for thread in threads:
        thread.join()
    assert got == [frames, frames]
    for receiver in receivers:
        receiver.close()


def test_a_slow_rank_is_waited_for(folder: Path, rendezvous: Rendezvous) -> None:
    sender, (receiver,) = opened(rendezvous, 2)
    sent = threading.Event()

    def send() -> None:
        for number in range(plan_channel._SLOTS + 1):
            sender.send(bytes([number]) * 10)
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.1)  # the fifth frame takes the first one's place
    assert receiver.receive() == bytes(10)
    assert sent.wait(10)
    assert [receiver.receive() for _ in range(plan_channel._SLOTS)] == [bytes([number]) * 10 for number in range(1, 5)]
    thread.join()
    sender.close()
    assert receiver.receive() is None
    receiver.close()


def test_what_a_rank_left_that_was_killed_while_the_others_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_channel, "_memory", lambda: tmp_path)
    joining, left = plan_channel._folder(), plan_channel._folder()
    strangers = [tmp_path / "headrace-notes", tmp_path / "other"]
    for folder in (joining, left, *strangers):
        folder.mkdir(exist_ok=True)
        (folder / "plans").touch()
    long_ago = time.time() - 2 * plan_channel._ABANDONED_S
    for folder in (left, *strangers):
        os.utime(folder, (long_ago, long_ago))
    made = plan_channel._folder()
    assert set(tmp_path.iterdir()) == {joining, made, *strangers}


def test_a_rank_that_is_gone(folder: Path, rendezvous: Rendezvous) -> None:
    sender, (receiver,) = opened(rendezvous, 2)
    sender.send(b"one")
    assert receiver.receive() == b"one"
    assert not sender.is_broken
    receiver.close()
    assert sender.is_broken
    with pytest.raises(RankLost, match="start"):
        sender.send(b"two")
    sender.close()
