"""What every test may rely on: no network, no deadline, one copy of every module."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["EFFC_CACHE"] = "off"  # what a test compiles, it compiles
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores
settings.register_profile("effc", deadline=None)
settings.load_profile("effc")


@pytest.fixture(autouse=True, scope="session")
def one_copy_of_every_module() -> Iterator[None]:
    """The root is on `sys.path` under pytest: `import passes` would load `effc.passes` twice."""
    yield
    doubles = {"passes", "backends", "calib"} & set(sys.modules)
    assert not doubles, f"imported from the root instead of from effc: {sorted(doubles)}"
