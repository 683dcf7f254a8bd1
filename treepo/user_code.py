"""The user's code in a configuration: a function or a class that a setting names as `module:name`.

Sections with kinds (`sampler.branching`, `advantage`, `loss`, `task`, `engine`, ...) take a class of the user as
`kind: my_module:MyClass`. The other keys of the section are its arguments. `Custom` implements this for all of them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from treepo.errors import ConfigError, nearest
from treepo.settings import Settings

PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def imported(spec: str) -> Callable[..., Any]:
    """The callable `module:name`. The module may be a file in the current directory.

    Raises `ConfigError` if the module cannot be imported or has no such callable.
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
    """Type and first line of an error that code outside treepo raised."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def arguments_of(spec: str) -> set[str]:
    """Names of the arguments that the class `module:name` takes; empty if it cannot be imported or inspected."""
    try:
        found = imported(spec)
        if inspect.isclass(found) and issubclass(found, BaseModel):
            return {field.alias or name for name, field in found.model_fields.items()}
        parameters = inspect.signature(found).parameters.values()
    except (ConfigError, TypeError, ValueError):  # a later check reports why the class cannot be used
        return set()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


class RefusedKeyError(ConfigError):
    """A class of the user does not accept one of the keys of its section."""

    def __init__(self, kind: str, key: str, reason: str) -> None:
        super().__init__(f"{kind}: {key}: {reason}")
        self.key, self.reason = key, reason


class Custom(Settings):
    """A class of the user, which `kind` names. It is called with the other keys as keyword arguments.

    The class may be a `Settings` class or any other. `model_dump` gives the same keys back. A subclass of `Custom`
    lists in `calls` the methods that the object must have, and in `first` the arguments that come before the keys.
    """

    model_config = ConfigDict(extra="allow")

    calls: ClassVar[dict[str, Callable[..., Any]]]
    """The methods that the object must have: name -> a function of treepo that takes the same arguments."""

    first: ClassVar[tuple[str, ...]] = ()
    """Arguments that are known only later, such as the model of an engine. Then call `make` with them."""

    kind: str = Field(pattern=f"^{PATTERN}$", description="Your class as module:name.")

    @cached_property
    def made(self) -> Any:
        """The object, if its class needs no argument but the keys."""
        return self.make()

    def make(self, *first: Any) -> Any:
        """A new object from `first` and the keys. Raises `ConfigError` if the class does not accept them."""
        given = self.__pydantic_extra__ or {}
        create = imported(self.kind)
        try:
            return create(*first, **given)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ")
            if not where:
                raise ConfigError(f"{self.kind}: {message}") from error
            given_value = "" if isinstance(problem["input"], dict) else f", not {problem['input']!r}"
            if problem["type"] == "extra_forbidden":
                reason = f"unknown key of {self.kind}{nearest(where, arguments_of(self.kind))}"
            else:
                reason = "is required" if problem["type"] == "missing" else message + given_value
            raise RefusedKeyError(self.kind, where, reason) from error
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{self.kind}(...) with {given or 'no settings'} raised {in_a_line(error)}") from error

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            # If the object needs arguments that are not known yet, check its class.
            found = imported(self.kind) if self.first else self.made
        except ConfigError as error:
            raise ValueError(str(error)) from error
        what = self.kind if self.first else f"{self.kind} makes a {type(found).__name__}, which"
        if self.first:
            names = [*self.first, *(self.__pydantic_extra__ or {})]
            shape = f"{self.kind.partition(':')[2]}({', '.join(names)})"
            self._require_call(found, (None,) * len(self.first), self.__pydantic_extra__ or {}, shape)
        for name, ours in self.calls.items():
            arguments = [p for key, p in inspect.signature(ours).parameters.items() if key != "self"]
            positional = [p.name for p in arguments if p.kind is not p.KEYWORD_ONLY]
            keywords = {p.name: None for p in arguments if p.kind is p.KEYWORD_ONLY}
            shape = f"{name}({', '.join(['self', *positional, *(['*'] if keywords else []), *keywords])})"
            method = getattr(found, name, None)
            if not callable(method):
                raise ValueError(f"{what} needs a method {shape}")
            given = (None, *positional) if self.first else tuple(positional)  # a method of the class also takes `self`
            self._require_call(method, given, keywords, shape)
        return self

    def _require_call(self, function: Any, given: tuple[Any, ...], keywords: dict[str, Any], shape: str) -> None:
        try:
            inspect.signature(function).bind(*given, **keywords)
        except TypeError as error:
            raise ValueError(f"{self.kind} must allow the call {shape}: {error}") from error

    def _refuse(self, what: str) -> ConfigError:
        return ConfigError(f"{self.kind} {what}")


def kind_of(default: str | None = None) -> Callable[[Any], str | None]:
    """A function that gives the tag of a value in a union of kinds.

    The tag is the value's `kind`, "custom" for a kind `module:name`, and `default` for a value without a kind.
    """

    def tag(value: Any) -> str | None:
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)
        return "custom" if isinstance(kind, str) and ":" in kind else kind

    return tag


def one_of(*kinds: str, default: str | None = None) -> BeforeValidator:
    """A validator that accepts the `kinds` and `module:name`, and explains what is wrong with any other value.

    `default`: the kind of a value without a kind.
    """

    def known(value: Any) -> Any:
        if not isinstance(value, dict | BaseModel):
            raise ValueError(f"expected keys and values, such as {{kind: {default or kinds[0]}}}")
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)
        if kind is None:
            raise ValueError(f"kind is missing: choose one of {', '.join(kinds)}, my_module:MyClass")
        if not isinstance(kind, str) or (":" not in kind and kind not in kinds):
            hint = nearest(kind, kinds) if isinstance(kind, str) else ""
            raise ValueError(f"kind {kind!r} is none of {', '.join(kinds)}, my_module:MyClass{hint}")
        return value

    return BeforeValidator(known)
