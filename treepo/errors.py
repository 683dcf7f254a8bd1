"""Every error that treepo raises on purpose.

    TreePOError
    |-- ConfigError   a setting, a command line or a model folder cannot be used as given
    |-- TaskError     a problem, a data file or a reward function is at fault
    |-- EngineError   the world: a server is down, a request timed out, memory ran out
    `-- DivergenceError   an update made numbers that are not finite

Messages say where, what was given, what is allowed, and how to mend it, in one line. Anything else that
escapes is a bug of ours and is never caught.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TreePOError(Exception):
    """Root of the errors that a caller may want to catch."""


class ConfigError(TreePOError):
    """A setting, a command line or a model cannot be used as given."""


class TaskError(TreePOError):
    """A problem, a data file or a reward function is at fault."""


class EngineError(TreePOError):
    """An inference engine could not answer; raised at the engine's edge only."""


class DivergenceError(TreePOError):
    """An update was not applied, because its gradient is not finite."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'width'?"` for the allowed word closest to `given`, or `""` if none is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
