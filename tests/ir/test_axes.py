"""Axes are split, laid end to end and made equal as `view`, `cat` and sums of tensors do it to indices."""

import math

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.ir import axes
from effc.ir.axes import Stop, cut, kept, leaf, leaves, of, places, product, size_of, total, unify

WHY = Stop(reason="test")


def sizes(axis):
    return [x.size for x in leaves(axis)]


def free(axis):
    return [x.size for x in leaves(axis) if x.stop is None]


def test_heads_are_a_product():
    rows, heads, width = leaf(24), leaf(4), leaf(6)
    unify(rows, product([heads, width]), WHY)
    assert sizes(rows) == [4, 6]
    assert places(rows, of(heads)).tolist() == [h for h in range(4) for _ in range(6)]
    assert places(rows, of(width)).tolist() == list(range(6)) * 4


def test_unlike_groupings_meet_in_common_parts():
    channels = leaf(24)
    unify(channels, product([leaf(4), leaf(6)]), WHY)
    unify(channels, product([leaf(8), leaf(3)]), WHY)
    assert sizes(channels) == [4, 2, 3]
    assert free(channels) == [4, 2, 3]


def test_groupings_without_common_parts_are_stopped():
    a, b = product([leaf(3), leaf(4)]), product([leaf(4), leaf(3)])
    unify(a, b, WHY)
    assert free(a) == free(b) == []
    assert {x.stop for x in leaves(a)} == {WHY}


def test_halves_that_change_places_are_one():
    whole = leaf(8)
    first, second = cut(whole, 4, WHY)
    unify(whole, total([second, first]), WHY)
    assert sizes(whole) == [4, 4]
    assert of(first) is of(second)
    assert places(whole, of(first)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_cut_inside_a_group_stops_that_group_alone():
    channels = leaf(24)
    unify(channels, product([leaf(4), leaf(6)]), WHY)
    low, high = cut(channels, 9, WHY)
    assert (low.size, high.size) == (9, 15)
    assert sizes(channels) == [1, 1, 2, 6]
    assert free(channels) == [1, 2]  # groups before and behind the one that is cut


def test_a_sum_is_grouped_where_each_part_is():
    both = total([leaf(8), leaf(4)])
    outer, inner = axes.split(both, 6, 2, WHY)
    assert sizes(outer) == [4, 2]
    assert inner.size == 2
    assert axes.split(total([leaf(9), leaf(3)]), 6, 2, WHY) is None


def test_what_is_stopped_stays_stopped_when_it_is_split():
    rows = leaf(6, WHY)
    unify(rows, product([leaf(2), leaf(3)]), Stop(reason="other"))
    assert {x.stop for x in leaves(rows)} == {WHY}


def test_sizes_that_differ_are_stopped():
    a, b = leaf(3), leaf(4)
    unify(a, b, WHY)
    assert a.stop is b.stop is WHY


def test_a_free_dimension_is_split_off():
    batch = sympy.Symbol("b", integer=True, positive=True)
    rows, heads = leaf(4 * batch), leaf(4)
    axes.align([rows], [leaf(batch), heads], WHY)
    assert [x.size for x in leaves(rows)] == [batch, 4]
    assert of(heads).stop is None


@pytest.mark.parametrize("at", [0, 5])
def test_an_empty_part_is_none(at):
    low, high = cut(leaf(5), at, WHY)
    assert (low is None, high is None) == (at == 0, at == 5)


factorings = st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(factorings, st.data())
def test_whatever_is_unified_keeps_the_same_indices(factors, data):
    """A dimension that is viewed, cut and joined in random ways: every name for it keeps the same places."""
    size = math.prod(factors)
    whole = leaf(size)
    others = [product([leaf(f) for f in factors])]
    others.append(product([leaf(f) for f in data.draw(st.permutations(factors))]))
    at = data.draw(st.integers(1, size))
    others.append(total([x for x in (leaf(at), leaf(size - at)) if x.size]))
    for other in others:
        unify(whole, other, WHY)
    keep = {}
    for unit in {x for x in leaves(whole) if x.stop is None and x.size > 1}:
        flags = np.array(data.draw(st.lists(st.booleans(), min_size=unit.size, max_size=unit.size)))
        flags[0] = True
        keep[unit] = flags
    flags = kept(whole, keep)
    assert len(flags) == size
    for other in others:
        assert kept(other, keep).tolist() == flags.tolist()
        assert size_of(other, {a: int(f.sum()) for a, f in keep.items()}) == flags.sum()
    for unit, mine in keep.items():
        where = places(whole, unit)
        assert not any(flags[(where >= 0) & ~mine[where]])
