"""Files and folders that are complete or do not exist, and errors of the disk as `ConfigError`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treepo.errors import ConfigError


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn an `OSError` while `path` is written into a `ConfigError`, whose message ends with `remedy`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; {remedy}") from error


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `final` at the end. After an error, `final` is as before."""
    part = _part(final)
    try:
        yield part
        part.replace(final)
    except BaseException:  # clean up, then raise it again
        part.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(final: Path, *, sync: bool = False) -> Iterator[Path]:
    """A new folder to fill, which is renamed to `final` at the end. After an error, `final` is as before.

    `sync`: write the files to the disk before the rename. Otherwise a crash of the machine may leave the renamed folder
    with empty files. A folder that a killed process left incomplete is removed first.
    """
    part = _part(final)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if sync:
            for file in part.iterdir():
                _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        if sync:
            _sync(final.parent)
    except BaseException:  # clean up, then raise it again
        shutil.rmtree(part, ignore_errors=True)
        raise


def forget_parts(folder: Path) -> None:
    """Remove the incomplete files and folders that `whole_file` and `whole_folder` left when they were killed."""
    for part in folder.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def _part(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
