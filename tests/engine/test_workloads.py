"""The benchmark's jobs are the ones that other engines ran."""

from __future__ import annotations

import pytest
from workloads import CHECKSUM_VOCABULARY, WORKLOADS, checksum, draw_single, draw_uneven, draw_workload


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_workloads_of_other_engines_are_drawn_again(name):
    jobs = draw_workload(name, CHECKSUM_VOCABULARY)
    assert len(jobs) == WORKLOADS[name].count
    assert checksum(jobs) == WORKLOADS[name].checksum


def test_w1_has_the_published_number_of_tokens():
    jobs = draw_workload("W1", CHECKSUM_VOCABULARY)
    assert (sum(len(job.ids) for job in jobs), sum(job.length for job in jobs)) == (517_881, 298_986)


def test_a_workload_that_differs_is_refused(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "W3", WORKLOADS["W3"]._replace(output=(128, 129)))
    with pytest.raises(ValueError, match="W3"):
        draw_workload("W3", CHECKSUM_VOCABULARY)


def test_uneven_lengths_are_mostly_short_and_stay_in_range():
    jobs = draw_uneven(1000, 400, 256, 128)
    lengths = sorted(job.length for job in jobs)
    assert (min(lengths) >= 8, max(lengths) <= 128, lengths[200] < 48) == (True, True, True)
    assert all(16 <= len(job.ids) <= 256 and max(job.ids) < 1000 for job in jobs)
    assert draw_uneven(1000, 400, 256, 128) == jobs
    assert (len(draw_single(1000).ids), draw_single(1000).length) == (128, 512)
