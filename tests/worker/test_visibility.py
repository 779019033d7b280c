"""Renewing delivery times in Redis, against kombu's own channel."""

from __future__ import annotations

import time

import pytest
import redis
from servers import RedisServer

from headrace.broker import KEY_PREFIX, Broker, dispatch
from headrace.config import GenerationConfig
from headrace.errors import QueueUnavailable
from headrace.settings import Settings
from headrace.store import Store
from worker.visibility import VisibilityRenewer

INDEX = KEY_PREFIX + "unacked_index"


def test_messages_in_hand_are_renewed_and_acknowledged_ones_stay_away(settings: Settings, store: Store, broker: Broker) -> None:
    store.create_batch(["a", "b", "c"], GenerationConfig(), model="echo", chunk_size=1)
    assert dispatch(store, broker, settings, "echo") == 3
    client = redis.Redis.from_url(settings.redis_url)
    renewer = VisibilityRenewer(settings.redis_url)
    assert renewer.renew() == 0
    taken = []
    with broker.app.connection_for_read() as connection, connection.channel() as channel:
        consumer = broker.app.amqp.TaskConsumer(channel, callbacks=[lambda _, message: taken.append(message)])
        with consumer:
            while len(taken) < 3:
                connection.drain_events(timeout=5)
            renewer.follow(channel)
            before = dict(client.zrange(INDEX, 0, -1, withscores=True))
            assert len(before) == 3
            time.sleep(0.05)
            assert renewer.renew() == 3
            after = dict(client.zrange(INDEX, 0, -1, withscores=True))
            assert set(after) == set(before)
            assert all(after[tag] > before[tag] for tag in before)
            taken[0].ack()
            channel.qos._delivered[taken[0].delivery_tag] = taken[0]  # as if it were acknowledged during the renewal
            renewer.renew()
            assert client.zcard(INDEX) == 2, "XX: an acknowledged message does not come back"
            del channel.qos._delivered[taken[0].delivery_tag]
            for message in taken[1:]:
                message.ack()
    renewer.close()
    client.close()


def test_a_redis_that_is_away_is_said_so(settings: Settings, store: Store, broker: Broker, redis_server: RedisServer) -> None:
    store.create_batch(["a"], GenerationConfig(), model="echo")
    assert dispatch(store, broker, settings, "echo") == 1
    renewer = VisibilityRenewer(settings.redis_url)
    taken: list = []
    with broker.app.connection_for_read() as connection, connection.channel() as channel:
        consumer = broker.app.amqp.TaskConsumer(channel, callbacks=[lambda _, message: taken.append(message)])
        consumer.consume()
        while not taken:
            connection.drain_events(timeout=5)
        renewer.follow(channel)
        redis_server.kill9()
        with pytest.raises(QueueUnavailable):
            renewer.renew()
        redis_server.start()
        assert renewer.renew() == 1
    renewer.close()
