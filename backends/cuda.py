"""Tensors in the memory of the first NVIDIA GPU, by name, through the CUDA driver alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from effc.backends.base import Array
from effc.errors import LoweringError


@functools.cache
def obstacle() -> str | None:
    """Why nothing can be computed on a GPU of this machine; None where something can."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return "cuda-bindings is not installed"
    try:
        (status,) = driver.cuInit(0)
        if int(status) != 0:
            return f"its NVIDIA driver does not work ({status.name})"
        status, count = driver.cuDeviceGetCount()
    except Exception:  # what the bindings raise where they find no driver has changed over time
        return "it has no NVIDIA driver"
    return None if int(status) == 0 and count else "it has no NVIDIA GPU"


@functools.cache
def gpu() -> tuple[str, str]:
    """Name of the first GPU, and its compute capability as a word: `sm86`."""
    from cuda.bindings import driver

    device = called(driver.cuDeviceGet(0))
    kind = driver.CUdevice_attribute
    numbers = [
        called(driver.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    ]
    name = bytes(called(driver.cuDeviceGetName(100, device))).split(b"\0")[0].decode()
    return name, "sm" + "".join(map(str, numbers))


def called(result: Sequence[Any]) -> Any:
    """What a call of the driver gives. Raises LoweringError where it failed."""
    status, *values = result
    if int(status) != 0:
        raise LoweringError(
            f"the GPU's driver says {status.name}",
            hint="nvidia-smi shows what else holds the GPU and its memory",
        )
    return values[0] if len(values) == 1 else values


class Memory:
    """Buffers on the first GPU, kept from call to call, and a stream in which all copies stand in order."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver, self._places = driver, dict[str, tuple[int, int]]()
        called(driver.cuInit(0))
        self._device = called(driver.cuDeviceGet(0))
        self._context = called(driver.cuDevicePrimaryCtxRetain(self._device))
        called(driver.cuCtxSetCurrent(self._context))
        self._stream = called(driver.cuStreamCreate(0))

    @contextmanager
    def current(self) -> Iterator[None]:
        """With the GPU's context in the thread that calls."""
        called(self._driver.cuCtxSetCurrent(self._context))
        yield

    @property
    def stream(self) -> int:
        return int(self._stream)

    def place(self, name: str, size: int) -> int:
        """Where a tensor of `size` bytes lies, made anew where it was too small."""
        place, room = self._places.get(name, (0, 0))
        if place and room >= size:
            return place
        if place:
            self.synchronize()
            del self._places[name]
            called(self._driver.cuMemFree(place))
        made = int(called(self._driver.cuMemAlloc(max(size, 1))))
        self._places[name] = made, size
        return made

    def upload(self, name: str, value: Array) -> int:
        """Copy a contiguous array, which must live until `synchronize`; gives where it lies."""
        place = self.place(name, value.nbytes)
        if value.nbytes:
            copy = self._driver.cuMemcpyHtoDAsync
            called(copy(place, value.ctypes.data, value.nbytes, self._stream))
        return place

    def download(self, name: str, into: Array) -> None:
        """Copy a tensor into a contiguous array, which has it after `synchronize`."""
        if into.nbytes:
            copy = self._driver.cuMemcpyDtoHAsync
            called(copy(into.ctypes.data, self._places[name][0], into.nbytes, self._stream))

    def synchronize(self) -> None:
        called(self._driver.cuStreamSynchronize(self._stream))

    def close(self) -> None:
        for place, _ in self._places.values():
            self._driver.cuMemFree(place)
        self._places.clear()
        if self._stream is not None:
            self._driver.cuStreamDestroy(self._stream)
            self._driver.cuDevicePrimaryCtxRelease(self._device)
            self._stream = None
