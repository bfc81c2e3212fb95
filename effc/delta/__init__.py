"""Weight deltas: what changed between two packages, in few bytes, put on a device that must not be without an engine.

`make` is the side that has both packages, `device` the side that has one. Nothing here is loaded before it is asked
for, and what `device` needs is numpy, onnxruntime, zstandard and cryptography.
"""
