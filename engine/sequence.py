"""A request on its way through the engine: what is known, what is computed, where it sits. No policy and no device here."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from engine.blocks import ROOT_KEY, prefix_key
from engine.request import LimitName, TokenRequest
from headrace.completion import TokenLogprobs
from headrace.errors import ContextLengthExceeded, InvalidRequest, KVCapacity

if TYPE_CHECKING:
    from engine.guidance import Guide


class SequenceState:
    """Mutable state of one request, owned by the scheduler; the engine fills the fields that are marked so.

    There is no "prefill" and no "decode": positions num_computed .. num_tokens-1 are still to be computed, and a step
    computes some of them.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached_tokens",
        "capacity",
        "done",
        "exact",
        "final",
        "forked",
        "guide",
        "keys",
        "limit",
        "logprobs",
        "num_computed",
        "num_prompt",
        "num_registered",
        "num_scored",
        "num_to_score",
        "num_tokens",
        "preemptions",
        "prompt_logprobs",
        "queued_at",
        "reported",
        "request",
        "shared_blocks",
        "slot",
        "started_at",
        "stop_from",
        "stops",
        "tokens",
        "watched",
    )

    def __init__(self, request: TokenRequest, *, arrival: int, max_new_tokens: int, limit: LimitName) -> None:
        self.request = request
        self.arrival = arrival
        self.tokens = list(request.prompt_ids)
        """Known to the host: the prompt and every token read so far."""
        self.num_prompt = len(self.tokens)
        self.num_tokens = self.num_prompt
        """`len(tokens)` and the tokens that launched steps choose and the host hasn't read."""
        self.num_computed = 0
        """Positions whose KV is there once every launched step has run."""
        # Once for a prompt: its other choices have the same.
        wants_scores = request.config.prompt_logprobs is not None and request.choice == 0
        self.num_to_score = self.num_prompt - 1 if wants_scores else 0
        """`num_scored` at the end."""
        self.final = self.num_prompt + max_new_tokens
        """`num_tokens` at which it ends in any case."""
        self.limit = limit
        # Filled by the scheduler while the sequence runs.
        self.slot: int | None = None
        self.blocks: list[int] = []
        self.capacity = 0
        """Positions that `blocks` have room for."""
        self.keys: list[bytes] = []
        """Prefix keys of the first full blocks, as far as anybody asked."""
        self.num_registered = 0
        """Leading blocks that are findable by their key (or have a twin that is)."""
        self.shared_blocks = 0
        """Blocks found in the cache that another running sequence was using already: they cost the pool nothing."""
        self.forked = False
        """Whether it started on the blocks of a sibling, so that its prompt isn't counted again."""
        self.preemptions = 0
        self.num_scored = 0
        """Leading positions of the prompt whose following token's log-probability a launched step gives."""
        self.done = False
        # What ends it.
        stops = () if request.config.ignore_eos else (*request.eos_ids, *request.stop_ids)
        self.stops = frozenset(stops)
        guided = request.config.response_format is not None
        self.stop_from = self.num_prompt + (0 if guided else request.config.min_new_tokens)
        """`len(tokens)` from which on a stop token ends it (before, the sampler bans them; a grammar comes first)."""
        self.exact = not self.stops and not guided
        """Whether only its length can end it."""
        # Filled by the engine.
        self.queued_at = 0.0
        self.started_at: float | None = None
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wants_scores else None
        """Of the prompt's tokens but the first, as far as read; None: not asked for, or reported already."""
        self.reported = self.num_prompt
        """`len(tokens)` at the last report."""
        self.logprobs: list[TokenLogprobs] | None = None if request.config.logprobs is None else []
        self.guide: Guide | None = None
        """Its place in its grammar, where it has a response format that the host follows."""
        self.watched = request.stream or self.logprobs is not None
        """Whether the engine must look at it in every step, not only when it ends; set for who has a guide, too."""

    @property
    def generated(self) -> int:
        """Tokens generated so far, those in flight included."""
        return self.num_tokens - self.num_prompt

    @property
    def is_scored(self) -> bool:
        """Whether no (further) position of the prompt must be computed for its log-probability's sake."""
        return self.num_scored >= self.num_to_score

    def key(self, index: int, block_size: int) -> bytes:
        """Return the prefix key of full block `index`, whose tokens must be known."""
        keys, tokens = self.keys, self.tokens
        while len(keys) <= index:
            start = len(keys) * block_size
            assert start + block_size <= len(tokens), "the key of a block whose tokens are not all known"
            keys.append(prefix_key(keys[-1] if keys else self._root, tokens[start : start + block_size]))
        return keys[index]

    @property
    def _root(self) -> bytes:
        """The parent of its first block's key: keys that were turned by another base are other keys."""
        stretch = self.request.rope_stretch
        return ROOT_KEY if stretch == 1.0 else ROOT_KEY + struct.pack("<d", stretch)


def make_sequence(request: TokenRequest, *, arrival: int, session_len: int, num_blocks: int, block_size: int) -> SequenceState:
    """Make the state of a request that just came.

    Raise `ContextLengthExceeded` or `KVCapacity` for one that could never run. One whose prompt fits but whose
    `max_new_tokens` doesn't is cut to what session length and pool leave: it may well end by itself before.
    """
    num_prompt = len(request.prompt_ids)
    capacity = num_blocks * block_size
    if not num_prompt:
        raise InvalidRequest("the prompt has no tokens; give it at least one", param="prompt_ids")
    # Where the prompt's own log-probabilities are wanted, it may fill the session: what is chosen behind it is never computed.
    longest = session_len + (request.config.prompt_logprobs is not None)
    if num_prompt >= longest:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens, the session length is {session_len}; shorten it or raise session_len"
        )
    if num_prompt > capacity:
        raise KVCapacity(
            f"the prompt has {num_prompt} tokens, the KV pool holds {capacity} "
            f"({num_blocks} blocks of {block_size}); shorten it or give the engine a larger pool"
        )
    # The last token's KV is never computed, so one token more than the pool's positions can be there.
    room = min(longest, capacity + 1) - num_prompt
    fits = request.max_new_tokens <= room
    ends_at: LimitName = "session_len" if longest <= capacity + 1 else "kv_pool"
    return SequenceState(
        request,
        arrival=arrival,
        max_new_tokens=request.max_new_tokens if fits else room,
        limit=request.limit if fits else ends_at,
    )
