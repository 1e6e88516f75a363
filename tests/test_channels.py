"""Tests of how ties become components."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxslim_kd.passes.channels import connected

SIZE = 30


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1))))
def test_ties_are_solved_as_scipy_does(ties: list[tuple[int, int]]) -> None:
    a, b = np.array(ties, np.int64).reshape(-1, 2).T
    count, label = connected(SIZE, a, b)
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(SIZE, SIZE))
    wanted, components = connected_components(graph, directed=False)
    assert (count, label.tolist()) == (wanted, components.tolist())


def test_ties_of_long_rows_to_one_and_to_neighbours_are_solved() -> None:
    size = 100_000
    order = np.random.default_rng(0).permutation(size)
    star, path = (order[1:], np.full(size - 1, order[0])), (order[1:], order[:-1])
    for a, b in (star, path):
        count, label = connected(size, a, b)
        assert count == 1 and not label.any()
