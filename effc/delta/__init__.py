"""Weight deltas: what changed between two packages, in few bytes, put on a device that must not be without an engine.

`make` is the side that has both packages, `device` the side that has one. Nothing here is loaded before it is asked
for, and what `device` needs is numpy, onnxruntime, zstandard and cryptography.
"""

from importlib.util import find_spec

from effc.errors import DeltaError

if missing := [name for name in ("cryptography", "zstandard") if find_spec(name) is None]:
    raise DeltaError(
        f"weight deltas need {' and '.join(missing)}, not installed here",
        hint="pip install 'effc[delta]', or on a device: pip install cryptography zstandard",
    )
