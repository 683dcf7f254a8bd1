"""Policies that a user wrote: `kind: my_module:MyClass` in place of one of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from treepo.errors import ConfigError, nearest
from treepo.named import PATTERN, in_a_line, named
from treepo.settings import Settings


class Own(Settings):
    """A class of the user's, named by `kind`; it is called with the other keys and must return the policy.

    So it may be a `Settings` class or anything else that takes its settings as keyword arguments. `model_dump` gives
    the same keys back.
    """

    model_config = ConfigDict(extra="allow")

    calls: ClassVar[dict[str, Callable[..., Any]]]
    """What the policy must be able to do: the name of each method, and ours, which has the same arguments."""

    kind: str = Field(pattern=f"^{PATTERN}$", description="Your class as module:name.")

    @cached_property
    def policy(self) -> Any:
        """The user's policy itself."""
        given = self.__pydantic_extra__ or {}
        make = named(self.kind)
        try:
            return make(**given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                allowed = make.model_fields if inspect.isclass(make) and issubclass(make, BaseModel) else ()
                raise ConfigError(f"{self.kind} knows no {where!r}{nearest(where, allowed)}") from error
            raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(f"{self.kind}(...) with {given or 'no settings'} raised {in_a_line(error)}") from error

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            policy = self.policy
        except ConfigError as error:
            raise ValueError(str(error)) from error
        for name, ours in self.calls.items():
            wanted = inspect.signature(ours)
            arguments = [p for key, p in wanted.parameters.items() if key != "self"]
            positional = [p.name for p in arguments if p.kind is not p.KEYWORD_ONLY]
            keywords = {p.name: None for p in arguments if p.kind is p.KEYWORD_ONLY}
            shape = f"{name}({', '.join(['self', *positional, *(['*'] if keywords else []), *keywords])})"
            method = getattr(policy, name, None)
            if not callable(method):
                raise ValueError(f"{self.kind} makes a {type(policy).__name__}, which needs a method {shape}")
            try:
                inspect.signature(method).bind(*positional, **keywords)
            except TypeError as error:
                raise ValueError(f"{self.kind}: {name} must take what {shape} takes: {error}") from error
        return self

    def _refuse(self, what: str) -> ConfigError:
        return ConfigError(f"the policy {self.kind} {what}")


def kind_of(default: str) -> Callable[[Any], str | None]:
    """The tag of a value of a union of policies; `default` where it names no kind."""

    def tag(value: Any) -> str | None:
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)
        return "own" if isinstance(kind, str) and ":" in kind else kind

    return tag


def one_of(*kinds: str) -> BeforeValidator:
    """Refuses a `kind` that is none of `kinds` and names no class of the user's."""

    def known(value: Any) -> Any:
        kind = value.get("kind", kinds[0]) if isinstance(value, dict) else kinds[0]
        if not isinstance(kind, str) or (":" not in kind and kind not in kinds):
            hint = nearest(kind, kinds) if isinstance(kind, str) else ""
            raise ValueError(f"kind {kind!r} is none of {', '.join(kinds)}, my_module:MyClass{hint}")
        return value

    return BeforeValidator(known)
