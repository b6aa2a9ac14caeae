"""What every part of the configuration has in common: frozen, typed, and a sentence for each fault."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from rwkv_cluster.errors import ConfigError


class InvalidFields(ConfigError):
    """Fields of a section that are unknown, of the wrong type or out of range. `faults`: pydantic's details of each."""

    def __init__(self, message: str, faults: list[ErrorDetails]) -> None:
        super().__init__(message, faults)
        self.faults = faults

    def __str__(self) -> str:
        return str(self.args[0])


class Section(BaseModel):
    """A frozen part of the configuration. Unknown fields are refused; positional arguments follow field order.

    Making one raises InvalidFields, a ConfigError with a sentence for each fault.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = list(type(self).model_fields)
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {len(names)} arguments, got {len(args)}")
        given = dict(zip(names, args))  # noqa: B905 -- fewer arguments than fields is the rule
        if twice := [name for name in given if name in kwargs]:
            raise TypeError(f"{type(self).__name__} got {twice[0]} twice, by position and by name")
        try:
            super().__init__(**given, **kwargs)
        except ValidationError as error:
            faults = list(_flat(error.errors()))
            sentences = [f"{type(self).__name__}: {_sentence(fault, names)}" for fault in faults]
            raise InvalidFields("\n".join(sentences), faults) from None


def _flat(details: list[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Faults with those of nested sections in the place of the one that stands for them."""
    for fault in details:
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, InvalidFields):
            for inner in cause.faults:
                outer: ErrorDetails = inner.copy()
                outer["loc"] = (*fault["loc"], *inner["loc"])
                yield outer
        else:
            yield fault


def _sentence(fault: ErrorDetails, names: list[str]) -> str:
    """A fault for people. names: fields of the section, for the nearest one to an unknown name."""
    field = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, names, 1)
        return f"there is no field '{field}'. " + (f"Nearest: {near[0]}" if near else f"Fields: {', '.join(names)}")
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return f"{field} is {fault['input']!r}. {fault['msg']}"
