"""The way in which classes of ponder become pytrees: frozen dataclasses, compared by identity."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

from jax.tree_util import register_dataclass

__all__ = ["pytree", "static"]

Class = TypeVar("Class", bound=type)


def static(**settings: Any) -> Any:
    """Declare a field that is part of the structure and no child: hashable, and compiled in."""
    return dataclasses.field(metadata={"static": True}, **settings)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static))
def pytree(cls: Class) -> Class:
    """Make a class a frozen dataclass whose fields, but for the `static` ones, are children of a pytree."""
    return register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(cls))  # pyright: ignore
