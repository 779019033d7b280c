"""The choice of graph sizes; replays themselves are tested on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest

from engine.graphs import fastest_sizes, graph_sizes


@pytest.mark.parametrize("most", [1, 3, 7, 128, 300, 1000, 1024])
def test_grid_reaches_the_largest_batch_in_small_steps(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes[-1] == most
    assert all(high - low <= max(8, low // 8) for low, high in pairwise(sizes))


def test_smallest_fitting_size() -> None:
    assert fastest_sizes({1: 1.0, 2: 1.0, 4: 1.1, 8: 1.2}) == [1, 1, 2, 4, 4, 8, 8, 8, 8]


def test_a_hole_is_stepped_over() -> None:
    sizes = fastest_sizes({64: 5.0, 432: 9.0, 448: 13.0, 464: 12.9, 512: 9.1})
    assert sizes[432] == 432
    assert sizes[433] == sizes[448] == sizes[449] == 512
    assert len(sizes) == 513


def test_noise_is_no_reason_to_pad() -> None:
    sizes = fastest_sizes({8: 2.0, 16: 1.0, 64: 5.0, 72: 4.9})
    assert sizes[5] == 8
    assert sizes[60] == sizes[64] == 64
