"""What every part of the configuration has in common: typed, checked when it is set, a sentence for each fault."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.paths import written_out
from rwkv_cluster.runtime.terminal.nearest import suggestion

if TYPE_CHECKING:
    from typing_extensions import Self


class InvalidFields(ConfigError):
    """Fields of a section that are unknown, of the wrong type or out of range. `faults`: pydantic's details of each."""

    def __init__(self, message: str, faults: Sequence[ErrorDetails] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class Section(BaseModel):
    """A part of the configuration. Unknown fields are refused; positional arguments follow field order.

    Making one, and setting a field, raises InvalidFields, a ConfigError with a sentence for each fault. The copies in a
    `Config` are frozen. `dataclasses.replace`, `asdict` and `fields` take a section for a dataclass, which it is in
    rwkv-trainer.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    _is_frozen: bool = PrivateAttr(default=False)

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

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        fields = [(name, field.annotation, _dataclass_field(field)) for name, field in cls.model_fields.items()]
        same: Any = dataclasses.make_dataclass(cls.__name__, fields)
        cls.__dataclass_fields__ = same.__dataclass_fields__  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
            return
        if self._is_frozen:
            raise ConfigError(
                f"{type(self).__name__}.{name} belongs to a whole configuration, which does not change",
                remedy=f"Make another one: dataclasses.replace(section, {name}=...)",
            )
        changed = self.__replace__(**{name: value})
        self.__dict__.update(changed.__dict__)
        self.__pydantic_fields_set__.add(name)

    def __replace__(self, **changes: Any) -> Self:
        """A checked copy with other values, which is not frozen."""
        copy = type(self)(**{**dict(self), **changes})
        copy.__pydantic_fields_set__.intersection_update(self.__pydantic_fields_set__ | changes.keys())
        return copy

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and dict(self) == dict(other)

    @property
    def is_frozen(self) -> bool:
        """Whether it is part of a `Config`."""
        return self._is_frozen

    def frozen(self) -> Self:
        """A copy that does not change, nor do the sections in it."""
        return self._copy(is_frozen=True)

    def thawed(self) -> Self:
        """A copy whose fields may be set, as may those of the sections in it."""
        return self._copy(is_frozen=False)

    def _copy(self, *, is_frozen: bool) -> Self:
        copy = self.model_copy(deep=True)
        copy._set_frozen(is_frozen)
        return copy

    def _set_frozen(self, is_frozen: bool) -> None:
        for _, value in self:
            if isinstance(value, Section):
                value._set_frozen(is_frozen)
        self._is_frozen = is_frozen


def path_text(value: Any, info: ValidationInfo) -> Any:
    """Check before that of a field that holds a path, or a list of them: see `paths.written_out`."""
    if isinstance(value, (list, tuple)):
        return [path_text(entry, info) for entry in value]
    is_path = isinstance(value, (str, os.PathLike))
    return written_out(value, info.field_name or "the path") if is_path else value


def _dataclass_field(field: FieldInfo) -> Any:
    if field.default_factory is not None:
        return dataclasses.field(default_factory=lambda: field.get_default(call_default_factory=True))
    return dataclasses.field(default=field.default)


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
        return f"there is no field '{field}'. {suggestion(field, names, 'Fields')}"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return f"{field} is {fault['input']!r}. {fault['msg']}"
