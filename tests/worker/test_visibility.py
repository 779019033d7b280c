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
    taken: list = []
    renewer = VisibilityRenewer(settings.redis_url, unfinished=lambda: {message.delivery_tag for message in taken})
    assert renewer.renew() == 0
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
    taken: list = []
    renewer = VisibilityRenewer(settings.redis_url, unfinished=lambda: {message.delivery_tag for message in taken})
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


def test_a_message_whose_acknowledgement_was_lost_gives_its_place_back(
    settings: Settings, store: Store, broker: Broker
) -> None:
    """Celery gives an acknowledgement up when its connection is reset; the place of the message would be taken for ever."""
    store.create_batch(["a", "b"], GenerationConfig(), model="echo", chunk_size=1)
    assert dispatch(store, broker, settings, "echo") == 2
    client = redis.Redis.from_url(settings.redis_url)
    taken: list = []
    renewer = VisibilityRenewer(settings.redis_url, unfinished=lambda: {message.delivery_tag for message in taken[1:]})
    with broker.app.connection_for_read() as connection, connection.channel() as channel:
        channel.basic_qos(0, 2, False)
        consumer = broker.app.amqp.TaskConsumer(channel, callbacks=[lambda _, message: taken.append(message)])
        with consumer:
            while len(taken) < 2:
                connection.drain_events(timeout=5)
            renewer.follow(channel)
            assert not channel.qos.can_consume()
            assert renewer.renew() == 2, "a message that has just come in may have no task yet"
            assert renewer.renew() == 1
            assert channel.qos.can_consume()
            assert client.zrange(INDEX, 0, -1) == [taken[1].delivery_tag.encode()]
            assert client.hkeys(KEY_PREFIX + "unacked") == [taken[1].delivery_tag.encode()]
            taken[1].ack()
    renewer.close()
    client.close()
