"""Versions and the device, which are saved with the numbers of a measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path


def versions(packages: Sequence[str] = ("treepo", "torch", "transformers", "numpy")) -> dict[str, str]:
    """The versions of Python and of `packages`, by name."""
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def device() -> str:
    """The accelerator's name, or the name of the processor with the number of threads that torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [row.split(":", 1)[1].strip() for row in cpuinfo.read_text().splitlines() if row[:10] == "model name"]
        model = names[0] if names else model
    return f"CPU {model}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
