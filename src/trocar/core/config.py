"""Frozen settings that reject unknown keys with the nearest valid one. Floor 0."""

from __future__ import annotations

from typing import Any, TypeVar

import pydantic

from trocar.core.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")


class Config(pydantic.BaseModel):
    """Base of every settings object: immutable, strict about names, validated once."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    @classmethod
    def parse(cls: type[C], data: Any, where: str = "settings") -> C:
        """Validate a plain mapping. Raises ConfigError with the key's path, what was wrong, and for an unknown key the nearest one."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where} must be a mapping, not {type(data).__name__}.")
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            raise ConfigError(*_explain(cls, error, where)) from None


def _explain(cls: type[Config], error: pydantic.ValidationError, where: str) -> tuple[str, str]:
    errors = error.errors(include_url=False)
    first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])  # a misspelt key is why another is missing
    path = ".".join([where, *(str(part) for part in first["loc"])])
    if first["type"] == "extra_forbidden":
        owner: Any = cls
        for part in first["loc"][:-1]:
            owner = _field_model(owner, part)
        known = owner.model_fields if isinstance(owner, type) and issubclass(owner, pydantic.BaseModel) else {}
        return f"{path} is not a known setting.", nearest(str(first["loc"][-1]), known) if known else ""
    others = len(errors) - 1
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]} (got {first['input']!r}).", f"({others} more.)" if others else ""


def _field_model(owner: Any, part: int | str) -> Any:
    """The settings class behind one step of an error's path; steps through list indices and union tags return what they were given."""
    if isinstance(owner, type) and issubclass(owner, pydantic.BaseModel) and part in owner.model_fields:
        stack = [owner.model_fields[str(part)].annotation]
        while stack:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
                return kind
            stack.extend(getattr(kind, "__args__", ()))
        return None
    return owner
