"""The block pool alone: counts, prefixes, eviction order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import ROOT_KEY, BlockPool, prefix_key


def key_of(*tokens: int) -> bytes:
    return prefix_key(ROOT_KEY, tokens)


def test_blocks_are_given_once_and_taken_back():
    pool = BlockPool(3)
    first, second = pool.allocate(2), pool.allocate(1)
    assert sorted([*first, *second]) == [0, 1, 2]
    assert (pool.num_free, pool.num_used) == (0, 3)
    pool.release(first)
    assert pool.num_free == 2
    pool.check_integrity([second])
    with pytest.raises(AssertionError, match="num_free"):
        pool.allocate(3)


def test_a_registered_block_outlives_its_owner_until_it_is_evicted():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(block, key_of(1))
    pool.release([block])
    assert pool.find(key_of(1)) == block
    assert pool.num_idle == 1
    # The other block is blank and goes first.
    (other,) = pool.allocate(1)
    assert other != block
    assert pool.find(key_of(1)) == block
    assert pool.allocate(1) == [block]
    assert pool.find(key_of(1)) is None


def test_eviction_takes_the_least_recently_used_and_the_deep_end_of_a_prefix_first():
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for number, block in enumerate([*old, *new]):
        pool.register(block, key_of(number))
    pool.release(old)
    pool.release(new)
    pool.share([old[0]])
    pool.release([old[0]])
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], new[1], new[0], old[0]]


def test_a_shared_block_is_free_when_its_last_owner_leaves():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.register(block, key_of(1))
    pool.share([block])
    pool.release([block])
    assert pool.num_used == 1
    pool.check_integrity([[block]])
    pool.release([block])
    pool.check_integrity([])
    with pytest.raises(AssertionError, match="twice"):
        pool.release([block])


def test_the_first_block_with_a_content_stays_the_answer():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, key_of(1))
    pool.register(second, key_of(1))
    assert pool.find(key_of(1)) == first
    pool.release([second])
    assert pool.num_idle == 0
    pool.check_integrity([[first]])


def test_a_forgotten_prefix_is_not_found_and_its_block_is_blank():
    pool = BlockPool(2)
    held, idle = pool.allocate(2)
    pool.register(held, key_of(1))
    pool.register(idle, key_of(2))
    pool.release([idle])
    pool.forget([key_of(1), key_of(2), key_of(3)])
    assert pool.find(key_of(1)) is None
    assert pool.find(key_of(2)) is None
    assert pool.num_idle == 0
    pool.check_integrity([[held]])


def test_check_integrity_sees_a_leak_and_a_double_owner():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="differ"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="differ"):
        pool.check_integrity([[block], [block]])


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=4),
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=4),
)
def test_chained_keys_are_equal_exactly_when_all_tokens_before_are(one, other):
    def chain(blocks):
        key = ROOT_KEY
        for tokens in blocks:
            key = prefix_key(key, tokens)
        return key

    assert (chain(one) == chain(other)) == (one == other)


class PoolMachine(RuleBasedStateMachine):
    """Random owners over a pool of six blocks; the model is a dict of contents."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.tables: list[list[int]] = []
        self.content: dict[int, int] = {}
        self.next_content = 0

    @rule(count=st.integers(1, 3), register=st.booleans())
    def take(self, count: int, register: bool) -> None:
        if count > self.pool.num_free:
            return
        blocks = self.pool.allocate(count)
        for block in blocks:
            assert all(block not in table for table in self.tables), "a block in use was given away"
            self.next_content += 1
            self.content[block] = self.next_content
            if register:
                self.pool.register(block, key_of(self.next_content))
        self.tables.append(blocks)

    @rule(back=st.integers(0, 8))
    def look_up(self, back: int) -> None:
        content = self.next_content - back
        block = self.pool.find(key_of(content))
        if block is not None:
            assert self.content[block] == content, "a prefix leads to a block that holds something else"
            self.pool.share([block])
            self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(index=st.integers(0, 100))
    def give_back(self, index: int) -> None:
        self.pool.release(self.tables.pop(index % len(self.tables)))

    @rule(back=st.integers(0, 8))
    def forget(self, back: int) -> None:
        self.pool.forget([key_of(self.next_content - back)])

    @invariant()
    def intact(self) -> None:
        self.pool.check_integrity(self.tables)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
