"""How much larger a process becomes while it calibrates, for a test that runs this in one of its own."""

import re
from pathlib import Path

from graphs import normal, quantize
from torch import nn

import effc
from effc.calib.data import Batch

STATUS = Path("/proc/self/status")


def resident():
    """Bytes that are the process's own: pages of files come and go as the machine needs room."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    return int(kilobytes) << 10


def growth(kept=None):
    """Bytes that a process is larger before the last of 200 batches of 50 samples than before the third.

    `kept` takes one batch in ten, as a calibrator that leaks would. The batches that are read once more to compare the
    outputs do not count: by then the weights are codes, and the heap has kept room of that.
    """
    seen = []

    def stream(role):
        for number in range(200):
            seen.append(resident())
            batch = Batch(inputs={"input": normal(50, 512, seed=number).numpy()})
            if kept is not None and number % 10 == 0:
                kept.append(batch)
            yield batch

    quantize(effc.trace(nn.Linear(512, 512), normal(2, 512)), stream)
    calibrating = seen[:200]
    assert len(calibrating) == 200
    return max(calibrating[2:]) - calibrating[2]
