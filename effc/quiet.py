"""Libraries kept from remarks on their own internals, which tell a user nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str, level: int) -> Iterator[None]:
    """No warnings, and of those loggers nothing below `level`; afterwards all is as it was."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in loggers:
            logging.getLogger(name).setLevel(level)
        try:
            yield
        finally:
            for name, before in levels.items():
                logging.getLogger(name).setLevel(before)
