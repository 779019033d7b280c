"""Sampling against the published vectors of its generator, the definition of its filters and the statistics of its draws."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import naive_kept, sampling_inputs

from kernels.reference_sampling import philox, uniform
from kernels.sampling import PenaltyInputs, add_bias, allow_only, apply_penalties, ban, sample, token_logprobs

# Random123's kat_vectors, philox4x32 10: counter, key (low word first), output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    words = philox(torch.tensor([key]), tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_uniform_is_exact_and_spread() -> None:
    rows = 100_000
    u = uniform(torch.full((rows,), 7), torch.arange(rows), torch.zeros(rows, dtype=torch.int32))
    assert ((u >= 0) & (u < 1)).all()
    assert torch.equal(u * 2**24, (u * 2**24).round())
    histogram = torch.histc(u, bins=100, min=0, max=1)
    chi2 = ((histogram - rows / 100) ** 2 / (rows / 100)).sum().item()
    assert 50 < chi2 < 170  # 99 degrees of freedom; both ends are beyond 1 in 10,000
    other = uniform(torch.full((rows,), 7), torch.arange(rows), torch.ones(rows, dtype=torch.int32))
    assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1].item()) < 0.02


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.3, "top_p": 0.99},
    {"temperature": 1.7, "top_k": 700, "min_p": 0.001},
]


def logits_of(rows: int, vocab: int, *, kind: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=g) * 3
    return {"smooth": x, "tied": (x * 2).round() / 2, "flat": x * 0.01, "banned": x.masked_fill(x < 0, -math.inf)}[kind]


@pytest.mark.parametrize("kind", ["smooth", "tied", "flat", "banned"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [100, 1563])
def test_draw_is_the_inverse_cdf_of_what_the_filters_keep(filters: dict[str, float], kind: str, vocab: int) -> None:
    rows = 24
    logits = logits_of(rows, vocab, kind=kind, seed=vocab)
    inputs = sampling_inputs(rows, **filters)
    before = logits.clone()
    tokens, best = sample(logits, inputs)
    assert torch.equal(best, logits.amax(-1))
    assert torch.equal(logits, before)
    u = uniform(inputs.seed_R, inputs.position_R, inputs.choice_R).double()
    for row in range(rows):
        asked = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
        kept = naive_kept(logits[row], **asked)
        token = int(tokens[row])
        assert kept[token] > 0
        upper = kept.cumsum(0)[token] / kept.sum()
        lower = upper - kept[token] / kept.sum()
        assert lower - 1e-5 <= u[row] <= upper + 1e-5


def test_rows_with_different_wishes_do_not_touch_each_other() -> None:
    rows, vocab = 6, 900
    logits = logits_of(rows, vocab, kind="smooth", seed=3)
    wishes = {
        "temperature": [1.0, 0.7, 1.0, 2.0, 1.0, 0.1],
        "top_k": [0, 50, 0, 3, 0, 0],
        "top_p": [1.0, 0.9, 0.8, 1.0, 1.0, 0.5],
        "min_p": [0.0, 0.0, 0.1, 0.0, 0.0, 0.0],
        "greedy": [False, False, False, False, True, False],
    }
    inputs = sampling_inputs(rows, **wishes)
    together = sample(logits, inputs).tokens_R
    assert together[4] == logits[4].argmax()
    for row in range(rows):
        alone = sample(logits[row : row + 1], type(inputs)(*(t[row : row + 1] for t in inputs))).tokens_R
        assert alone[0] == together[row]


def test_a_flag_that_is_off_switches_its_filter_off() -> None:
    logits = torch.zeros(200, 50)
    inputs = sampling_inputs(200, top_k=1, top_p=0.01, min_p=0.0)
    logits[:, 7] = 0.1
    assert (sample(logits, inputs).tokens_R == 7).all()
    assert (sample(logits, inputs, any_top_k=False, any_top_p=False).tokens_R != 7).any()
    assert torch.equal(sample(logits, inputs, any_random=False).tokens_R, logits.argmax(-1))


def test_frequencies_follow_the_distribution() -> None:
    rows, probabilities = 40_000, torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    inputs = sampling_inputs(rows, seed=11)
    drawn = torch.bincount(sample(probabilities.log().expand(rows, 6).contiguous(), inputs).tokens_R, minlength=6)
    chi2 = ((drawn - rows * probabilities) ** 2 / (rows * probabilities)).sum().item()
    assert chi2 < 25.7  # 5 degrees of freedom, 1 in 10,000


def test_the_best_logit_names_the_rows_no_token_can_be_drawn_from() -> None:
    logits = torch.randn(5, 33)
    logits[0, 32], logits[1] = math.nan, -math.inf
    logits[2, :31], logits[3, 4] = -math.inf, math.inf
    tokens, best = sample(logits, sampling_inputs(5, top_k=3, top_p=0.9))
    assert best.isnan().tolist() == [True, False, False, False, False]
    assert best.isfinite().tolist() == [False, False, True, False, True]
    assert ((tokens >= 0) & (tokens < 33)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_read_as_the_float32_they_stand_for(dtype: torch.dtype) -> None:
    logits = logits_of(40, 700, kind="smooth", seed=5).to(dtype)
    inputs = sampling_inputs(40, temperature=0.7, top_k=[0, 30] * 20, top_p=[1.0, 0.9, 0.8, 1.0] * 10, min_p=0.01)
    narrow, wide = sample(logits, inputs), sample(logits.float(), inputs)
    assert torch.equal(narrow.tokens_R, wide.tokens_R)
    assert torch.equal(narrow.best_R, wide.best_R)
    assert torch.equal(sample(logits, inputs, any_random=False).tokens_R, logits.float().argmax(-1))
    got, expected = (token_logprobs(x, logits.argmax(-1), 3) for x in (logits, logits.float()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got.logprob_R.dtype == torch.float32
    logits[1], logits[2, 5], logits[3, :] = -math.inf, math.nan, 0.0
    assert (~sample(logits, inputs).best_R.isfinite()).nonzero().flatten().tolist() == [1, 2]
    ban(logits, torch.tensor([3]), torch.tensor([0]))
    allow_only(logits, torch.tensor([4]), torch.full((1, 30), 1, dtype=torch.int32))
    assert (logits[3] == -math.inf).nonzero().flatten().tolist() == [0]
    assert (logits[4] > -math.inf).nonzero().flatten().tolist() == list(range(0, 700, 32))
    with pytest.raises(TypeError, match="float32"):
        add_bias(logits, torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]))


def test_penalties_against_a_loop() -> None:
    rows, vocab, length = 5, 12, 9
    logits = torch.randn(7, vocab) * 2
    ids = torch.randint(0, vocab, (rows, length))
    ids[:, -2:] = 10**6  # past every row's length: never used as an index
    inputs = PenaltyInputs(
        token_ids_QL=ids.int(),
        prompt_lens_Q=torch.tensor([3, 7, 1, 0, 4]),
        total_lens_Q=torch.tensor([7, 7, 7, 5, 5]),
        repetition_Q=torch.tensor([1.3, 0.7, 1.0, 2.0, 1.0]),
        presence_Q=torch.tensor([0.5, 0.4, -0.3, 0.0, 0.0]),
        frequency_Q=torch.tensor([0.2, 0.1, 0.0, -1.0, 0.0]),
        rows_Q=torch.tensor([6, 0, 2, 5, 3]),
    )
    expected = logits.double()
    for q, row in enumerate(inputs.rows_Q.tolist()):
        known = ids[q, : inputs.total_lens_Q[q]].tolist()
        output = known[inputs.prompt_lens_Q[q] :]
        for token in set(known):
            x = expected[row, token]
            expected[row, token] = x / inputs.repetition_Q[q] if x > 0 else x * inputs.repetition_Q[q]
        for token in set(output):
            expected[row, token] -= inputs.presence_Q[q] + inputs.frequency_Q[q] * output.count(token)
    apply_penalties(logits, inputs)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)


def test_bias_and_bans() -> None:
    logits = torch.zeros(3, 4)
    add_bias(logits, torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([1.5, -2.0]))
    ban(logits, torch.tensor([1, 1]), torch.tensor([0, 2]))
    assert logits.tolist() == [[0, 1.5, 0, 0], [-math.inf, 0, -math.inf, 0], [0, 0, 0, -2.0]]


@pytest.mark.parametrize("k", [0, 1, 5])
def test_token_logprobs(k: int) -> None:
    logits = torch.randn(4, 63) * 3
    tokens = torch.randint(0, 63, (4,))
    expected = logits.double().log_softmax(-1)
    out = token_logprobs(logits, tokens, k)
    torch.testing.assert_close(out.logprob_R.double(), expected.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(out.top_ids_Rk, expected.topk(k).indices)
    torch.testing.assert_close(out.top_logprobs_Rk.double(), expected.topk(k).values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("vocab", "words"), [(1, 2), (64, 2), (100, 4), (100, 2), (257, 10)])
def test_allow_only_reads_the_bits_of_its_rows(vocab: int, words: int) -> None:
    logits = torch.randn(4, vocab)
    bits = torch.randint(-(2**31), 2**31, (2, words)).to(torch.int32)
    rows = torch.tensor([3, 1])
    expected = logits.clone()
    for number, row in enumerate((3, 1)):
        for token in range(vocab):
            if token >= 32 * words or not int(bits[number, token // 32]) >> (token % 32) & 1:
                expected[row, token] = -math.inf
    allow_only(logits, rows, bits)
    assert torch.equal(logits, expected)
