"""Drift of an engine over batches, in numbers, without room for copies of its outputs."""

import tracemalloc

import numpy as np
import pytest

from effc.errors import VerifyError
from effc.verify import AT_ONCE, parity


def compared(a, b, mask=None):
    feeds = {} if mask is None else {"attention_mask": mask}
    return parity(lambda _: {"y": a}, lambda _: {"y": b}, [feeds])["y"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_drift_is_over_all_values_and_the_cosine_over_samples():
    a = normal(3, 5)
    b = a + 0.1 * normal(3, 5, seed=1)
    found = compared(a, b)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    assert found.n == 3
    assert found.max_abs == pytest.approx(np.abs(a - b).max())
    assert found.rel_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert found.cosine == pytest.approx(((a * b).sum(1) / lengths).mean())


def test_of_a_padded_batch_a_sample_is_a_position_that_is_read():
    a, mask = normal(2, 3, 4), np.array([[1, 1, 0], [1, 1, 1]])
    b = a.copy()
    b[0, 2] += 100
    found = compared(a, b, mask)
    assert (found.n, found.max_abs) == (5, 0)


def test_a_number_alone_and_an_empty_output_are_compared():
    assert compared(np.array(2.0), np.array(3.0)).max_abs == 1
    assert compared(normal(2, 0), normal(2, 0)).n == 0
    assert compared(normal(2, 3, 0), normal(2, 3, 0), np.ones((2, 3))).n == 0


def test_an_engine_that_loses_a_number_is_refused():
    a = normal(2, 3)
    b = a.copy()
    b[1, 1] = np.nan
    with pytest.raises(VerifyError, match="not numbers") as caught:
        compared(a, b)
    assert caught.value.hint
    assert compared(b, a).max_abs < 10  # the model's own are its own


def test_large_outputs_are_compared_in_less_memory_than_they_have():
    a = np.ones((4, 16, AT_ONCE // 4), np.float32)
    b, mask = a * 2, np.ones((4, 16), np.int64)
    tracemalloc.start()
    try:
        assert compared(a, b, mask).max_abs == 1
        assert tracemalloc.get_traced_memory()[1] < a.nbytes / 1.2
    finally:
        tracemalloc.stop()
