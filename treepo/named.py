"""What a user wrote and a configuration names as `module:name`: a reward function, a policy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treepo.errors import ConfigError, nearest

PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def named(spec: str) -> Callable[..., Any]:
    """The callable `module:name`; modules in the current directory are found.

    Raises `ConfigError` if there is none or the module cannot be imported.
    """
    module_name, _, name = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(f"cannot import {module_name!r}: {in_a_line(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        what = "is not callable" if found is not None else "does not exist"
        raise ConfigError(f"{name!r} in {module_name!r} {what}{nearest(name, known)}")
    return found  # type: ignore[no-any-return]


def in_a_line(error: Exception) -> str:
    """Kind and first line of an error of somebody else's code."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
