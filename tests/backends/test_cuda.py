"""Memory of a GPU, where there is one; and what is said where there is none."""

import numpy as np
import pytest

from effc.backends import cuda

needs_gpu = pytest.mark.skipif(
    cuda.obstacle() is not None, reason=f"this machine: {cuda.obstacle()}"
)


@needs_gpu
def test_what_goes_up_comes_down_the_same():
    memory = cuda.Memory()
    sent = {f"x{i}": np.random.default_rng(i).standard_normal((i + 1, 1000)) for i in range(3)}
    for _ in range(2):  # the second time in the places of the first
        places = [memory.upload(name, value) for name, value in sent.items()]
        assert len(set(places)) == 3
    found = {name: np.zeros_like(value) for name, value in sent.items()}
    for name, value in found.items():
        memory.download(name, value)
    memory.synchronize()
    assert all(np.array_equal(sent[name], value) for name, value in found.items())
    memory.close()


@needs_gpu
def test_a_place_grows_and_an_empty_tensor_has_one():
    memory = cuda.Memory()
    small = memory.place("x", 10)
    assert memory.place("x", 5) == small
    memory.upload("x", np.ones(1 << 20, np.uint8))
    empty = np.zeros((0, 4), np.float32)
    memory.upload("none", empty)
    memory.download("none", empty)
    memory.synchronize()
    memory.close()


@needs_gpu
def test_more_than_there_is_room_for_is_an_error_of_ours():
    from effc.errors import LoweringError

    memory = cuda.Memory()
    with pytest.raises(LoweringError, match="OUT_OF_MEMORY"):
        memory.place("x", 1 << 50)
    memory.close()


@needs_gpu
def test_the_gpu_has_a_name_and_a_capability():
    name, word = cuda.gpu()
    assert name and word.startswith("sm") and word[2:].isdigit()
