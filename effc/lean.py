"""transformers for its tokenizers alone: without torch, which it loads wherever it finds it.

A process that only writes text is then some 300 MB smaller and starts sooner. What a tokenizer does is the same, since
transformers itself knows how to be without torch.
"""

from __future__ import annotations

import os
import sys

QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def without_torch() -> None:
    """Import transformers as if there were no torch, unless one of the two is loaded already.

    It loads no model in this process from then on, so this is for a command, and not for a library call.
    """
    if {"torch", "transformers"} & sys.modules.keys():
        return
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"  # or it says that models will not be available
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        from transformers import AutoTokenizer  # noqa: F401
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before
