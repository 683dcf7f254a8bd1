"""Every error that treepo raises on purpose.

    TreePOError
    |-- ConfigError   a setting, a command line or a model folder cannot be used as given
    |-- TaskError     a problem, a data file or a reward function is wrong
    |-- EngineError   an inference engine failed: a server is down, a request timed out, memory ran out
    `-- DivergenceError   an update gave numbers that are not finite

A message is one line. It has the place, the given value, what is allowed, and how to correct it. Any other exception is
a bug in treepo, and treepo does not catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TreePOError(Exception):
    """The parent of all errors that treepo raises on purpose."""


class ConfigError(TreePOError):
    """A setting, a command line or a model cannot be used as given."""


class TaskError(TreePOError):
    """A problem, a data file or a reward function is wrong."""


class EngineError(TreePOError):
    """An inference engine failed. Only engines, and the code that calls them, raise it."""


class DivergenceError(TreePOError):
    """An update was not applied, because its gradient is not finite."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'width'?"` for the allowed word closest to `given`, or `""` if none is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
