"""The KV block pool: which block is free, who shares one, and which full blocks hold a prefix worth finding again.

Blocks are numbers here; no KV is touched and no request is known. A block is in exactly one of three places:

    in use     references > 0; in the table of each sequence that refers to it
    idle       references == 0, and its content is registered under a prefix key: given again to whoever asks for that
               prefix, or evicted, least recently used first
    blank      references == 0 and nothing worth keeping: taken before any idle block is evicted

The key of a full block is the SHA-256 of its parent's key and its own token ids. Equal keys mean equal tokens, turned alike, from
position 0 on, so a hit needs no comparison of contents; a weaker hash could hand one prompt the KV of another.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

ROOT_KEY = b"headrace"
"""Parent of every first block; of a sequence whose rope is stretched, with the stretch behind it (`SequenceState`)."""


def prefix_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of a full block that holds `token_ids` and follows the block with key `parent`."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """`num_blocks` blocks with reference counts and a prefix index."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Least recently used first. Values are not used: an OrderedDict is the ordered set with O(1) removal.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: blank and idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that a sequence refers to."""
        return self.num_blocks - self.num_free

    @property
    def num_idle(self) -> int:
        """Free blocks that still hold a registered prefix."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference. The caller has looked at `num_free`."""
        blank, references = self._blank, self._references
        assert count <= self.num_free, "allocate() without a look at num_free"
        blocks = []
        for _ in range(count):
            if blank:
                block = blank.pop()
            else:
                block, _none = self._idle.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, key: bytes) -> int | None:
        """Return the block registered under `key`. Take it with `share` before anything is allocated."""
        return self._block_of.get(key)

    def is_idle(self, block: int) -> bool:
        """Whether taking this registered block takes it from the free ones."""
        return not self._references[block]

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of these registered blocks."""
        for block in blocks:
            if not self._references[block]:
                del self._idle[block]
            self._references[block] += 1

    def register(self, block: int, key: bytes) -> None:
        """Make a full block that is in use findable. If another block has this content already, that one stays the answer."""
        assert self._references[block], "only a block in use holds what its owner says"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, keys: Iterable[bytes]) -> None:
        """Make these prefixes unfindable; whoever uses their blocks keeps them."""
        for key in keys:
            block = self._block_of.pop(key, None)
            if block is None:
                continue
            del self._key_of[block]
            if not self._references[block]:
                del self._idle[block]
                self._blank.append(block)

    def release(self, table: Sequence[int]) -> None:
        """Drop one reference of each block of a table; a registered block that nobody refers to becomes idle.

        The table is walked from its end, so that of one prefix the deep blocks are evicted before the ones that lead
        to them: a block whose parent is gone can't be found again.
        """
        references, key_of = self._references, self._key_of
        for block in reversed(table):
            left = references[block] - 1
            references[block] = left
            if not left:
                if block in key_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)
            assert left >= 0, "a block was released twice"

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the counts with `tables`, the block tables of all live sequences. AssertionError: a bug of ours."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._references, "reference counts differ from the tables"
        free = set(self._blank)
        assert len(free) == len(self._blank), "a block is blank twice"
        assert free.isdisjoint(self._idle), "a block is both blank and idle"
        free.update(self._idle)
        assert all((count == 0) == (block in free) for block, count in enumerate(self._references)), "a block leaked"
        assert len(self._block_of) == len(self._key_of), "the prefix index is not one to one"
        assert all(self._block_of[key] == block for block, key in self._key_of.items()), (
            "the prefix index disagrees with itself"
        )
        assert self._key_of.keys() >= self._idle.keys(), "an idle block has no prefix"
        assert self._key_of.keys().isdisjoint(self._blank), "a blank block has a prefix"
