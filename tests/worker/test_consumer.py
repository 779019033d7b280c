"""A connection to Redis that breaks in the way that kombu can't close: the worker goes on."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from headrace.broker import Broker, dispatch
from headrace.config import GenerationConfig
from headrace.settings import Settings
from headrace.store import Store
from worker.consumer import SteadyConsumer

log = logging.getLogger("test")


def test_a_channel_that_lost_its_connection_does_not_end_the_worker(
    settings: Settings, store: Store, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    store.create_batch(["a", "b"], GenerationConfig(), model="echo", chunk_size=1)
    assert dispatch(store, broker, settings, "echo") == 2
    consumer = SteadyConsumer(lambda _: None, app=broker.app, controller=SimpleNamespace(use_eventloop=True))
    connection = consumer.connection = broker.app.connection_for_read()
    channel, transport, taken = connection.default_channel, connection.transport, []
    tasks = broker.app.amqp.TaskConsumer(channel, callbacks=[lambda _, message: taken.append(message)])
    tasks.consume()
    while len(taken) < 2:
        connection.drain_events(timeout=5)
    close = channel.close

    def close_without_connection() -> None:
        # What the teardown leaves now and then: a channel without a pool, and a transport that knows no address.
        channel._disconnect_pools()
        transport.client = None
        close()

    channel.close = close_without_connection
    with pytest.raises(AttributeError, match="hostname"):
        connection.close()
    consumer.connection = SimpleNamespace(
        close=taken[0].ack,
        collect=lambda **_: None,
        connection_errors=(OSError,),
        channel_errors=(),
        transport=transport,
    )
    consumer.on_connection_error_after_connected(ConnectionError("Redis is away"))
    assert consumer.connection is None
    assert "connection_dropped" in [getattr(record, "event", "") for record in caplog.records]
    taken[1].ack_log_error(log, consumer.connection_errors)
    assert "Couldn't ack" in caplog.text
