"""Code of the user that a configuration names as `module:name`: a function, or a class in place of one of ours.

`Custom` is the one way in which a section of the configuration (`sampler.branching`, `advantage`, `loss`, `task`,
`engine`, ...) takes a class of the user's: `kind: my_module:MyClass`, and the other keys are its arguments.
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


class Custom(Settings):
    """A class of the user's, named by `kind`. It is called with the other keys as keyword arguments.

    The class may be a `Settings` class or any other. `model_dump` gives the same keys back. A subclass says in `calls`
    which methods the object must have, and in `first` which arguments come before the keys.
    """

    model_config = ConfigDict(extra="allow")

    calls: ClassVar[dict[str, Callable[..., Any]]]
    """The methods that the object must have: a name, and a function of ours that takes the same arguments."""

    first: ClassVar[tuple[str, ...]] = ()
    """Arguments that are known only later, such as the model of an engine: then `make` creates the object."""

    kind: str = Field(pattern=f"^{PATTERN}$", description="Your class as module:name.")

    @cached_property
    def made(self) -> Any:
        """The object itself, for a class that needs its keys alone."""
        return self.make()

    def make(self, *first: Any) -> Any:
        """A new object from `first` and the keys; raises `ConfigError` if the class refuses them."""
        given = self.__pydantic_extra__ or {}
        create = imported(self.kind)
        try:
            return create(*first, **given)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                allowed = create.model_fields if inspect.isclass(create) and issubclass(create, BaseModel) else ()
                raise ConfigError(f"{self.kind} knows no {where!r}{nearest(where, allowed)}") from error
            raise ConfigError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from error
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{self.kind}(...) with {given or 'no settings'} raised {in_a_line(error)}") from error

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            # An object that cannot be made yet is judged by its class.
            found = imported(self.kind) if self.first else self.made
        except ConfigError as error:
            raise ValueError(str(error)) from error
        what = self.kind if self.first else f"{self.kind} makes a {type(found).__name__}, which"
        if self.first:
            names = [*self.first, *(self.__pydantic_extra__ or {})]
            self._require_call(found, (None,) * len(self.first), self.__pydantic_extra__ or {}, f"({', '.join(names)})")
        for name, ours in self.calls.items():
            arguments = [p for key, p in inspect.signature(ours).parameters.items() if key != "self"]
            positional = [p.name for p in arguments if p.kind is not p.KEYWORD_ONLY]
            keywords = {p.name: None for p in arguments if p.kind is p.KEYWORD_ONLY}
            shape = f"{name}({', '.join(['self', *positional, *(['*'] if keywords else []), *keywords])})"
            method = getattr(found, name, None)
            if not callable(method):
                raise ValueError(f"{what} needs a method {shape}")
            given = (None, *positional) if self.first else tuple(positional)  # a method of the class takes a self
            self._require_call(method, given, keywords, shape, name)
        return self

    def _require_call(
        self, function: Any, given: tuple[Any, ...], keywords: dict[str, Any], shape: str, name: str = "it"
    ) -> None:
        try:
            inspect.signature(function).bind(*given, **keywords)
        except TypeError as error:
            raise ValueError(f"{self.kind}: {name} must take what {shape} takes: {error}") from error

    def _refuse(self, what: str) -> ConfigError:
        return ConfigError(f"{self.kind} {what}")


def kind_of(default: str | None = None) -> Callable[[Any], str | None]:
    """The tag of a value in a union of kinds: its `kind`, "custom" for `module:name`, `default` where it names none."""

    def tag(value: Any) -> str | None:
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)
        return "custom" if isinstance(kind, str) and ":" in kind else kind

    return tag


def one_of(*kinds: str, default: str | None = None) -> BeforeValidator:
    """Refuses a `kind` that is none of `kinds` and names no class of the user's; `default`: the kind of no kind."""

    def known(value: Any) -> Any:
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)
        if kind is None:
            raise ValueError(f"kind is missing: choose one of {', '.join(kinds)}, my_module:MyClass")
        if not isinstance(kind, str) or (":" not in kind and kind not in kinds):
            hint = nearest(kind, kinds) if isinstance(kind, str) else ""
            raise ValueError(f"kind {kind!r} is none of {', '.join(kinds)}, my_module:MyClass{hint}")
        return value

    return BeforeValidator(known)
