"""Several processes that do one piece of work in step, on torch.distributed: gloo between CPUs.

Each runs the same program. Batches of calibration and of a training step are dealt out, what was counted is merged, and
gradients are summed, so that all have the same numbers behind it; the first process writes. They are started by
`--processes N`, or by whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, such as `accelerate launch -m effc`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from effc.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

PLACES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_state = {"rank": 0, "count": 1}


def rank() -> int:
    """Which of the processes this is, from 0."""
    return _state["rank"]


def count() -> int:
    """How many there are; 1 where there is no other."""
    return _state["count"]


def start() -> None:
    """Join the others, where the environment says that there are any. Raises UsageError where they do not answer."""
    if count() > 1 or int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return
    if missing := [word for word in PLACES if not os.environ.get(word)]:
        raise UsageError(
            f"WORLD_SIZE says that there are several processes, and {missing[0]} is not set",
            hint="start them by --processes N, or by accelerate launch -m effc",
        )
    from torch import distributed

    try:
        distributed.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the other processes do not answer: {str(error).splitlines()[0]}",
            hint="MASTER_ADDR and MASTER_PORT are those of the first one",
        ) from error
    _state.update(rank=distributed.get_rank(), count=distributed.get_world_size())


def gathered(value: Any) -> list[Any]:
    """What every process has of a value, in their order."""
    if count() == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found


def sum_up(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes into every tensor, which all have in one order."""
    if count() == 1:
        return
    import torch
    from torch import distributed

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    place = 0
    for tensor in tensors:
        tensor.copy_(flat[place : place + tensor.numel()].reshape(tensor.shape))
        place += tensor.numel()


def launch(words: Sequence[str], processes: int, threads: int) -> int:
    """Run `effc WORDS` as so many processes of this machine, and give the first exit code that is not 0.

    Each computes with `threads`, unless OMP_NUM_THREADS says otherwise. The first one speaks; what another says is
    shown where it fails first. Whoever fails ends all.
    """
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        port, running = str(_free_port()), list[subprocess.Popen[bytes]]()
        stack.callback(_end, running)
        for number in range(processes):
            own = dict(zip(PLACES, (str(number), str(processes), "127.0.0.1", port), strict=True))
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "effc", *words],
                    env={
                        **os.environ,
                        **own,
                        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
                        "GLOO_SOCKET_IFNAME": "lo",
                    },
                    stdout=None if number == 0 else subprocess.DEVNULL,
                    stderr=None if number == 0 else said[number],
                )
            )
        number, code = _first_failure(running)
        if number:
            _repeat(said[number])
        return code


def _first_failure(running: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Which process failed first and its code; 0 and 0 where all are done."""
    while True:
        codes = [process.poll() for process in running]
        for number, code in enumerate(codes):
            if code:
                return number, code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0, 0
        time.sleep(0.05)


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _repeat(said: IO[bytes]) -> None:
    said.seek(0)
    sys.stderr.write(said.read().decode("utf-8", "replace"))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
