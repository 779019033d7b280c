"""Decides who computes how many tokens in the next step, and who holds which KV blocks. Plain integers: no torch, no text.

Life of a request:

    waiting ──admit──▶ running ──last row planned──▶ leaving ──next plan()──▶ released
       ▲                  │
       └─preempt, put back┘          a stop token, an error or an abort releases it from any place, at once

`plan()` is called one step ahead of what the host knows: when step N+1 is planned, the tokens of step N are still on the
device. Therefore
- a request in `running` counts one token (`num_tokens`) more than its known `tokens`; the plan needs its position, not its id;
- a request that step N turns out to have ended has a row in step N+1 already; that row's token is dropped by the engine;
- a request whose last allowed token is planned gets no further row.

Why blocks and slots that are released on the host may be given away by the very next plan, although launched steps still
use them: steps run on the device in the order in which they were launched. What a new owner writes comes after everything
that a launched step reads or writes. For the same reason a block counts as computed as soon as the step that fills it
has been launched, and may then be found by its prefix in the next plan; its tokens must be known, because they are the key.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain, islice

from engine.admission import Admissions
from engine.blocks import BlockPool
from engine.budget import TokenBudget
from engine.draft import PlanDraft, PlannedStep
from engine.family import Families
from engine.forecast import Forecast, Load, OutputLengths
from engine.plan import Admission, PlanRow
from engine.prefix import PrefixCache
from engine.request import TokenRequest
from engine.sequence import SequenceState, make_sequence


class Scheduler:
    """Continuous batching over one block pool, with chunked prompts, prefix reuse and preemption by recompute."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        token_budget: int,
        prefill_interval: int,
        worthwhile_tokens: int,
        enable_prefix_caching: bool,
        session_len: int,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.preemptions = 0
        self._block_size = block_size
        self._max_batch_size = max_batch_size
        self.budget = TokenBudget(token_budget)
        self._session_len = session_len
        self._step = 0
        self._arrivals = 0
        self._free_slots = list(range(max_batch_size - 1, -1, -1))
        # In order of arrival; a preempted request goes back to the front.
        self._waiting: OrderedDict[int, SequenceState] = OrderedDict()
        self._waiting_tokens = 0
        # By slot, in order of admission: the last one is the youngest.
        self._running: dict[int, SequenceState] = {}
        # Their last row is launched; they are released by the next plan().
        self._leaving: list[SequenceState] = []
        # Blocks of these were filled by the last plan and are not registered yet.
        self._unregistered: list[SequenceState] = []
        self._prefixes = PrefixCache(self.pool, block_size, is_enabled=enable_prefix_caching)
        self._families = Families(self.pool, block_size)
        self._lengths = OutputLengths()
        self._admissions = Admissions(
            max_batch_size=max_batch_size, prefill_interval=prefill_interval, worthwhile_tokens=worthwhile_tokens
        )
        # Set when the head of the queue didn't fit; until blocks are released there is no use in asking again.
        self._pool_was_full = False

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running) + len(self._leaving)

    @property
    def num_waiting(self) -> int:
        """Requests that hold nothing yet, or nothing any more."""
        return len(self._waiting)

    def add(self, request: TokenRequest) -> SequenceState:
        """Queue a request. Raise `InvalidRequest`, `ContextLengthExceeded` or `KVCapacity` for one that could never run."""
        sequence = make_sequence(
            request,
            arrival=self._arrivals,
            session_len=self._session_len,
            num_blocks=self.pool.num_blocks,
            block_size=self._block_size,
        )
        self._arrivals += 1
        self._waiting[sequence.arrival] = sequence
        self._waiting_tokens += sequence.num_tokens
        self._families.join(sequence)
        return sequence

    def plan(self) -> PlannedStep | None:
        """Reserve what the next step needs and say what it computes; None: there is nothing to compute."""
        self._settle()
        draft = PlanDraft(self.budget.now)
        preemptions = self.preemptions
        self._continue_running(draft)
        self._admissions.count_step()
        # A request preempted by this very plan has a token in flight: it can't come back before the host has read it.
        if self.preemptions == preemptions:
            self._let_in(draft)
            # Nothing runs, and what waits doesn't fit beside the prompts that are kept for forks.
            if draft.is_empty and self._families.drop_trunks():
                self._let_in(draft)
        if draft.is_empty:
            return None
        self._step += 1
        return draft.finish(self._step)

    def put_back(self, planned: PlannedStep) -> list[SequenceState]:
        """Undo the plan made last, which didn't run, and give whose it was. Who was admitted by it waits again."""
        self._step -= 1
        self._unregistered.clear()
        # Who left did so in this plan: the others were released before it was made.
        running = sorted([*self._running.values(), *self._leaving], key=lambda sequence: sequence.arrival)
        self._leaving.clear()
        self._running = {sequence.slot: sequence for sequence in running}  # type: ignore[misc]  # they run
        # Who ended between launch and sampling has no slot any more.
        planned_rows = [(row, self._running[row.slot]) for row in planned.plan.rows if row.slot in self._running]
        for row, sequence in planned_rows:
            sequence.num_computed = row.start
            sequence.num_scored = min(sequence.num_scored, row.start)
            sequence.num_tokens -= row.samples
            if row.new_blocks:
                del sequence.blocks[-len(row.new_blocks) :]
                sequence.capacity -= len(row.new_blocks) * self._block_size
                self.pool.release(row.new_blocks)
        for sequence in reversed(planned.admitted):
            if sequence.slot is not None:
                del self._running[sequence.slot]
                self._send_back(sequence)
        return [sequence for _, sequence in planned_rows]

    def finish(self, sequence: SequenceState, *, completed: bool) -> None:
        """Release a request that ended, wherever it is. `completed`: its length is worth learning from."""
        assert not sequence.done, "a request ended twice"
        sequence.done = True
        if completed:
            self._lengths.record(len(sequence.tokens) - sequence.num_prompt)
        if sequence.arrival in self._waiting:
            del self._waiting[sequence.arrival]
            self._waiting_tokens -= sequence.num_tokens
            self._families.leave(sequence)
        elif sequence.slot is not None:
            if self._running.pop(sequence.slot, None) is None:
                self._leaving.remove(sequence)
            self._release(sequence)

    def distrust(self, sequence: SequenceState) -> None:
        """Forget the prefixes of a finished request with NaN logits: the NaN may sit in its KV and would spread to whoever finds it."""
        self.pool.forget(sequence.keys)

    def check_integrity(self) -> None:
        """Compare everything that is counted twice. AssertionError: a bug of ours."""
        held = [*self._running.values(), *self._leaving]
        self.pool.check_integrity(chain((sequence.blocks for sequence in held), self._families.tables()))
        slots = [sequence.slot for sequence in held]
        assert sorted([*self._free_slots, *slots]) == list(range(self._max_batch_size)), "a slot leaked"  # type: ignore[type-var]
        filed = all(sequence.slot == slot for slot, sequence in self._running.items())
        assert filed, "a sequence is filed under another's slot"
        for sequence in held:
            assert not sequence.done, "a request that ended still runs"
            room = len(sequence.blocks) * self._block_size
            assert sequence.capacity == room >= sequence.num_computed, "the block table is too short"
            assert 0 <= sequence.num_tokens - len(sequence.tokens) <= 2, "more tokens in flight than steps"
        for sequence in self._waiting.values():
            holds_nothing = sequence.slot is None and not sequence.blocks and not sequence.num_computed
            assert holds_nothing, "a waiting request holds something"
        waiting_tokens = sum(sequence.num_tokens for sequence in self._waiting.values())
        assert self._waiting_tokens == waiting_tokens, "waiting tokens miscounted"
        assert held or not self._prefixes.is_computing, "a prefix is said to be computed by nobody"

    def _settle(self) -> None:
        """Take note of the step that has been launched since the last plan."""
        if self._unregistered:
            for sequence in self._unregistered:
                if sequence.slot is not None:
                    self._prefixes.register(sequence)
            self._unregistered.clear()
        self._families.settle()
        for sequence in self._leaving:
            self._release(sequence)
        self._leaving.clear()

    def _continue_running(self, draft: PlanDraft) -> None:
        """Give each running request its next token, oldest first, and what is left of the budget to unfinished prompts."""
        running = list(self._running.values())
        unfinished: list[SequenceState] = []
        budget = draft.budget
        add_row, add_sampled = draft.singles.append, draft.sampled_by_singles.append
        # This loop is the scheduler's whole cost at a thousand requests: no calls but the three appended values.
        for sequence in running:
            if not budget:
                break
            start = sequence.num_computed
            num_tokens = sequence.num_tokens
            if num_tokens - start != 1:
                unfinished.append(sequence)
                continue
            new_blocks: tuple[int, ...] = ()
            if start == sequence.capacity:
                if not self._make_room(running, sequence):
                    break
                new_blocks = self._grow(sequence)
            add_row(PlanRow(sequence.slot, start, 1, True, num_tokens - sequence.num_prompt, new_blocks))  # type: ignore[arg-type]
            add_sampled(sequence)
            budget -= 1
            sequence.num_computed = num_tokens
            sequence.num_tokens = num_tokens = num_tokens + 1
            if num_tokens == sequence.final:
                self._leave(sequence)
        draft.budget = budget
        for sequence in unfinished:
            if draft.budget:
                self._add_chunk(draft, sequence)

    def _make_room(self, running: list[SequenceState], sequence: SequenceState) -> bool:
        """Preempt the youngest until a block is free; False when `sequence` was the youngest itself.

        `running` is the list that the caller iterates over: victims are cut from its end, where it hasn't been yet.
        """
        while not self.pool.num_free:
            if self._families.drop_trunks():
                continue
            victim = running.pop()
            assert victim.slot is not None, "a victim that doesn't run"
            del self._running[victim.slot]
            self._send_back(victim)
            victim.preemptions += 1
            self.preemptions += 1
            # Whoever is admitted into the blocks just freed takes them from the one they were freed for.
            self._pool_was_full = True
            if victim is sequence:
                return False
        return True

    def _send_back(self, sequence: SequenceState) -> None:
        """Take everything from a request and let it wait at the front of the queue."""
        self._release(sequence)
        sequence.num_computed = 0
        self._waiting[sequence.arrival] = sequence
        self._waiting.move_to_end(sequence.arrival, last=False)
        self._waiting_tokens += sequence.num_tokens

    def _grow(self, sequence: SequenceState) -> tuple[int, ...]:
        """Append a block to a sequence whose blocks are all full: all their tokens but the last few are known by now."""
        self._prefixes.register(sequence)
        block = self.pool.allocate(1)
        sequence.blocks += block
        sequence.capacity += self._block_size
        return tuple(block)

    def _add_chunk(self, draft: PlanDraft, sequence: SequenceState) -> None:
        """Compute as much of a prompt as the budget allows; its blocks are there since its admission."""
        start = sequence.num_computed
        count = min(sequence.num_tokens - start, draft.budget)
        end = start + count
        samples = end == sequence.num_tokens
        assert sequence.slot is not None, "a chunk of a sequence that doesn't run"
        scores = 0
        if not sequence.is_scored:
            scores = max(0, min(end, sequence.num_to_score) - start)
            sequence.num_scored = max(sequence.num_scored, start + scores)
        draft.add(PlanRow(sequence.slot, start, count, samples, sequence.generated, (), scores), sequence)
        sequence.num_computed = end
        if self._prefixes.is_enabled:
            self._unregistered.append(sequence)
        if samples:
            sequence.num_tokens += 1
            if sequence.num_tokens == sequence.final:
                self._leave(sequence)

    def _leave(self, sequence: SequenceState) -> None:
        """Nothing is left to compute; the plan in the making still uses slot and blocks, the next one may give them away."""
        del self._running[sequence.slot]  # type: ignore[arg-type]  # it runs
        self._leaving.append(sequence)

    def _may_admit(self, draft: PlanDraft) -> bool:
        """Whether prompts may join this step."""
        if not self._waiting or not self._free_slots:
            return False
        if not self._running:
            return True
        return not self._pool_was_full and self._admissions.are_due(
            running=len(self._running),
            free_slots=len(self._free_slots),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            budget=self.budget.now,
            has_chunks=bool(draft.chunks),
        )

    def _let_in(self, draft: PlanDraft) -> None:
        """Start what may start: forks first, at any time, because a fork is one token and takes no prompt's time; then prompts."""
        may_admit = self._may_admit(draft)
        may_fork = (may_admit or not self._pool_was_full) and bool(self._free_slots) and self._families.has_forks
        if not may_admit and not may_fork:
            return
        forecast = Forecast(map(self._load, self._running.values()), capacity=self.pool.num_blocks * self._block_size)
        if (not may_fork or self._fork(draft, forecast)) and may_admit:
            self._admit(draft, forecast)

    def _fork(self, draft: PlanDraft, forecast: Forecast) -> bool:
        """Start members of families on their siblings' blocks; False: one didn't fit, and nobody may overtake it."""
        for sequence, shared, source in self._families.forks():
            if not draft.budget or not self._free_slots:
                break
            if not self._fits(sequence, shared, forecast):
                self._pool_was_full = True
                return False
            self._families.leave(sequence)
            sequence.forked = True
            self._start(sequence, shared, draft, computed=sequence.num_prompt - 1)
            if source is not None:
                draft.copies.append((source, sequence.blocks[len(shared)]))
        return True

    def _admit(self, draft: PlanDraft, forecast: Forecast) -> None:
        """Let requests in, in order, while slots, tokens and blocks last.

        Passed over is only a request whose prefix another one is computing right now: a step later it finds it in the
        cache, where now it would compute and store it a second time. The other runs and therefore makes progress or
        releases what it was to compute, so nobody waits for ever. The same goes for members of a family.
        """
        for sequence in list(islice(self._waiting.values(), self._max_batch_size)):
            if not draft.budget or not self._free_slots:
                break
            cached = None if self._families.must_wait(sequence) else self._prefixes.find(sequence)
            if cached is None:
                continue
            if not self._fits(sequence, cached, forecast):
                self._pool_was_full = True
                break
            self._families.lead(sequence)
            if not sequence.preemptions:
                sequence.cached_tokens = len(cached) * self._block_size
            self._start(sequence, cached, draft, computed=len(cached) * self._block_size)
            self._admissions.count_prompt()

    def _fits(self, sequence: SequenceState, cached: list[int], forecast: Forecast) -> bool:
        idle = sum(map(self.pool.is_idle, cached))
        missing = -(-sequence.num_tokens // self._block_size) - len(cached)
        if missing + idle > self.pool.num_free:
            return False
        sequence.shared_blocks = len(cached) - idle
        # With nobody else there the forecast has no say: add() has made sure that it fits alone. But those behind it are held to it.
        return forecast.add(self._load(sequence), anyway=not self._running)

    def _load(self, sequence: SequenceState) -> Load:
        allowed = sequence.final - sequence.num_prompt
        generated = sequence.generated
        left = allowed - generated if sequence.exact else self._lengths.expect_left(generated, allowed)
        # A last block is on average half empty.
        size = sequence.num_tokens - sequence.shared_blocks * self._block_size + self._block_size // 2
        return Load(left, size)

    def _start(self, sequence: SequenceState, cached: list[int], draft: PlanDraft, *, computed: int) -> None:
        """Give a waiting request a slot, blocks for all its known tokens, and its first chunk, from position `computed` on."""
        assert len(sequence.tokens) == sequence.num_tokens, "admitted with tokens still in flight"
        del self._waiting[sequence.arrival]
        self._waiting_tokens -= sequence.num_tokens
        self._admissions.learn(sequence.num_tokens - computed, sequence.num_tokens)
        size = self._block_size
        # The cached blocks first: allocate() might evict them.
        self.pool.share(cached)
        sequence.blocks = cached + self.pool.allocate(-(-sequence.num_tokens // size) - len(cached))
        sequence.capacity = len(sequence.blocks) * size
        sequence.num_registered = len(cached)
        sequence.num_computed = computed
        self._prefixes.announce(sequence)
        slot = sequence.slot = self._free_slots.pop()
        self._running[slot] = sequence
        draft.admitted.append(Admission(slot, sequence.request, tuple(sequence.tokens), tuple(sequence.blocks)))
        draft.admitted_states.append(sequence)
        self._add_chunk(draft, sequence)

    def _release(self, sequence: SequenceState) -> None:
        """Take slot and blocks back; what was computed stays findable until it is evicted."""
        assert sequence.slot is not None, "released without a slot"
        self._prefixes.retire(sequence)
        self.pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.blocks = []
        sequence.capacity = 0
        sequence.num_registered = 0
        self._pool_was_full = False
